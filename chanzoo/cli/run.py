"""``chanzoo run``: start a script in which our networks are registered with timm."""

from __future__ import annotations

import argparse

HELP = "run a script, such as timm's, that finds our networks"
EXAMPLES = """\
  chanzoo run $TIMM_REPO/validate.py --model ce_cifar_resnet20.c10j --pretrained --data-dir DATA
  chanzoo run $TIMM_REPO/benchmark.py --model ce_resnet50
  chanzoo run -m my_package.train --epochs 2
  torchrun --nproc-per-node 2 -m chanzoo run $TIMM_REPO/train.py --model ce_resnet50

Imports timm and chanzoo, then runs the script as Python would. The installed timm is used, also where the
script lies beside another one. Child processes that start afresh (spawn) do not know our networks; for those
there is chanzoo autoload.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="path of the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="passed on as they are")


def run(args: argparse.Namespace) -> int:
    """Run the script; its own exit code and errors pass through."""
    from ..launch import launch

    launch(args.script, args.arguments, is_module=args.module)
    return 0
