"""What the verb `benchmark` is made of: subjects (our bundles and their peers), a process for each, and the report."""
