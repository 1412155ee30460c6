"""`optimum-cli export liger ...`: the verb `export` in optimum's command line.

A wheel carries this file as `optimum/commands/register/register_liger.py` too, where optimum looks for commands.
"""

from __future__ import annotations

import argparse
import sys
from typing import ClassVar

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class LigerExportCommand(BaseOptimumCLICommand):
    """The flags of `liger-deploy export`."""

    COMMAND: ClassVar[CommandInfo] = CommandInfo("liger", "Lower a Liger checkpoint to a bundle for one runtime.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        from liger_deploy.export.__main__ import add_arguments

        add_arguments(parser)

    def run(self) -> None:
        """Export; exits with the verb's code."""
        from liger_deploy import cli
        from liger_deploy.export.__main__ import export

        if code := cli.carry_out("export", export, self.args):
            sys.exit(code)


REGISTER_COMMANDS = [(LigerExportCommand, ExportCommand)]
