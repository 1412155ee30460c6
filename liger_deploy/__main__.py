"""`python -m liger_deploy VERB ...` and the `liger-deploy` console script."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from liger_deploy import __version__

# verb -> (module with main(argv), what it does)
VERBS = {
    "convert": ("convert", "turn a Hugging Face checkpoint into its Liger form"),
    "finetune": ("finetune", "repair a converted checkpoint with LoRA"),
    "merge": ("merge", "put an adapter into its checkpoint"),
    "evaluate": ("evaluate", "bits per byte of text under checkpoints, softmax or converted"),
    "export": ("export.__main__", "lower a Liger checkpoint to a bundle for one runtime"),
    "verify": ("verify", "prove that a bundle equals PyTorch: logits, state, tokens"),
    "generate": ("generate", "generate text with a bundle"),
    "benchmark": ("benchmark", "time bundles and their peers by depth on this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: liger-deploy VERB ... (liger-deploy VERB --help)\n")
        print("\n".join(f"  {verb:10}{text}" for verb, (_, text) in VERBS.items()))
        return 0 if arguments else 2
    verb = arguments.pop(0)
    if verb not in VERBS:
        print(f"liger-deploy: unknown verb {verb!r}: choose one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"liger_deploy.{VERBS[verb][0]}").main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
