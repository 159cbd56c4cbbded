"""`optimum-cli prune` and `optimum-cli export sparse24`: the words of `hf-prune prune` and `hf-prune export`.

Optimum imports this file whenever `optimum-cli` starts, so nothing heavy is imported before a command runs.
"""

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class _Forwarded(BaseOptimumCLICommand):
    """Hands what follows to `hf-prune`."""

    words: tuple[str, ...]
    rest: tuple[str, ...] = ()

    @staticmethod
    def parse_args(parser):
        parser.add_argument("model", help="folder or Hub name")
        parser.add_argument("output", help="folder to write")
        parser.add_argument("options", nargs=argparse.REMAINDER, help="as those of the same command of hf-prune")

    def run(self):
        from hf_prune.cli import main

        sys.exit(main([*self.words, self.args.model, self.args.output, *self.args.options, *self.rest]))


class PruneCommand(_Forwarded):
    COMMAND = CommandInfo(name="prune", help="Prune a causal language model and save it with its masks (hf_prune).")
    words = ("prune",)


class Sparse24Command(_Forwarded):
    COMMAND = CommandInfo(name="sparse24", help="Export a model pruned 2:4 to ONNX or OpenVINO; its zeros are checked there.")
    words, rest = ("export",), ("--pattern", "2:4")


REGISTER_COMMANDS = [PruneCommand, (Sparse24Command, ExportCommand)]
