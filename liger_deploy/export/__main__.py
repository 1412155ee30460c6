"""`python -m liger_deploy.export --target onnx`: argument parsing only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from liger_deploy import cli
from liger_deploy.errors import UserError
from liger_deploy.export import EMBEDDED, ExportOptions, export_bundle
from liger_deploy.export.backends import BACKENDS
from liger_deploy.export.targets import TARGETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("--target", required=True, help=f"runtime to export for: {', '.join(TARGETS)}")
    parser.add_argument("--model", type=Path, help="converted checkpoint (default: the embedded tiny model)")
    parser.add_argument("--out", type=Path, help="bundle directory to write (default: bundle-TARGET)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--quant", default="none", choices=("none", "int8", "int4"), help="weight-only quantization")
    parser.add_argument("--group-size", type=int, default=32, help="at int4, weights that share a scale (default: 32)")
    parser.add_argument(
        "--batch", help="rows the graph takes: a number or 'dynamic' (default: the latter, but 1 on executorch)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--backend",
        default="",
        choices=tuple(BACKENDS),
        help="what an executorch program is lowered for (default: xnnpack)",
    )
    parser.add_argument(
        "--external-weights", action="store_true", help="of executorch: weights in a .ptd file beside it"
    )
    parser.add_argument(
        "--calibrate", default="", metavar="DATA", help="of onnx: text over which int4 is chosen (GPTQ)"
    )
    parser.add_argument("--chunk", type=int, default=0, help="most tokens a prefill call takes")


def export(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    out = arguments.out or Path(f"bundle-{arguments.target}")
    options = ExportOptions(
        arguments.dtype,
        arguments.quant,
        _batch(arguments.batch),
        arguments.device,
        arguments.chunk,
        arguments.group_size,
        arguments.external_weights,
        arguments.backend,
        arguments.calibrate,
    )
    bundle = export_bundle(arguments.model or EMBEDDED, arguments.target, out, options)
    size = sum(info.size for info in bundle.manifest.files.values())
    state = bundle.manifest.spec.nbytes()
    print(f"wrote {out}: {size / 1e6:.1f} MB; its state is {state / 1e6:.3f} MB a sequence, at any length")
    print(f"next: liger-deploy verify --bundle {out}")
    return 0


def _batch(text: str | None) -> int | None:
    if text is None:
        return None
    if text == "dynamic":
        return 0
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 16:
        raise UserError(f"--batch must be a number from 1 to 65536 or 'dynamic', not {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the verb."""
    return cli.run("export", "Lower a Liger checkpoint to a bundle for one runtime.", add_arguments, export, argv)


if __name__ == "__main__":
    sys.exit(main())
