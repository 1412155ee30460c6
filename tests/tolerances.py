"""Every tolerance of the tests, with its reason. All relative to the largest absolute value of the expected result."""

# One float32 operator against its float64 reference: sums over some hundred terms, half an ulp (6e-8) each.
OP = 2e-6

# The same where log-decays reach 60, whose float32 is 4e-6 coarse: their sums over some tokens are exponents.
EXTREME = 8e-6

# Gradients pass through twice as many float32 operations, and exp'(x) scales them.
GRADIENT = 1e-4

# Two float32 forms of one whole model (chunked, step, another runtime): operator error through a few layers.
MODEL = 2e-5

# The untouched Hugging Face model against the same function in our form: order of sums and nothing else.
SAME_FUNCTION = 2e-6

# W + BA against W and BA apart: one rounding of the weights, float32.
MERGED = 1e-5
