"""``chanzoo publish``: a weight, or a network of one's own, onto the Hugging Face Hub."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ChanzooError, UsageError
from .common import add_format, emit, human_bytes, progress_bar, say

if TYPE_CHECKING:
    from ..hub.package import Package
    from ..hub.publish import Published

HELP = "publish a weight or a network of your own on the Hugging Face Hub"
EXAMPLES = """\
  chanzoo publish ce_cifar_resnet20.c10j --to ORG/ce_cifar_resnet20.c10j --data c10j=DIR
  chanzoo publish FOLDER --to ME/my-net --data DIR --license apache-2.0 --private
  chanzoo publish FOLDER --to ME/my-net --data DIR --dry-run    checks, lists, sends nothing
  chanzoo publish --all --to ORG --data c10j=DIR --data tin=DIR
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME|FOLDER",
        help="a weight of the table; a saved network; or the output folder of timm's train script",
    )
    parser.add_argument("--all", action="store_true", help="every weight of the table, to ORG/<its name>")
    parser.add_argument("--to", required=True, metavar="ORG/REPO", help="repository; with --all only ORG")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[TAG=]DIR",
        help="images on which the metrics are measured again; TAG names a data set of chanzoo",
    )
    parser.add_argument("--split", default="val", help="split of the images (default: val)")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--dry-run", action="store_true", help="check everything and send nothing")
    parser.add_argument("--license", metavar="ID", help="of the weights of a folder, as the Hub writes it")
    parser.add_argument("--base-model", metavar="ID", help="what the network of a folder was made from")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, then send it; the exit code is the worst of the errors'."""
    jobs, data = plan(args)
    from ..hub.publish import check_login, check_repo_id, publish

    for _, repo_id in jobs:
        check_repo_id(repo_id)
    if not args.dry_run:
        check_login(args.to)
    packages: list[Package] = []
    errors: list[ChanzooError] = []
    for name, repo_id in jobs:
        try:
            packages.append(check(name, repo_id, data, args))
        except ChanzooError as error:
            errors.append(error)
    if errors:  # one of them spoils all: nothing has been sent yet
        for error in errors:
            say(f"chanzoo: {error}")
        return max(error.exit_code for error in errors)
    results: list[Published | ChanzooError] = []
    for package in packages:
        try:
            results.append(publish(package, package.repo_id, private=args.private, dry_run=args.dry_run))
        except ChanzooError as error:
            results.append(error)
    report(packages, results, args)
    return max((r.exit_code for r in results if isinstance(r, ChanzooError)), default=0)


def plan(args: argparse.Namespace) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """What goes where, and folders of images by tag.

    Raises:
        UsageError: The options do not say so.
    """
    from ..weights import DATASETS, WEIGHTS

    if bool(args.name) == args.all:
        raise UsageError("name one weight or folder, or pass --all.\n  Nothing was sent.")
    if (args.all or not Path(args.name).is_dir()) and (args.license or args.base_model):
        raise UsageError("--license and --base-model are for a folder; a weight's row has its own.")
    data = {}
    for item in args.data:
        match = re.fullmatch(r"(\w+)=(.+)", item)
        tag, folder = match.groups() if match else ("", item)
        if tag and tag not in DATASETS:
            raise UsageError(f'no data set "{tag}"; there are: {", ".join(DATASETS)}')
        if not Path(folder).exists():
            raise UsageError(f'no image folder "{folder}".\n  Nothing was sent.')
        data[tag] = folder
    if args.all:
        if "/" in args.to:
            raise UsageError(
                f'--to {args.to}: with --all expected ORG alone, such as "{args.to.split("/")[0]}".'
            )
        return [(name, f"{args.to}/{name}") for name in sorted(WEIGHTS)], data
    return [(args.name, args.to)], data


def check(name: str, repo_id: str, data: dict[str, str], args: argparse.Namespace) -> Package:
    """Package a weight or a folder, and measure it again."""
    from ..hub.gate import check_package
    from ..hub.package import package_folder, package_row

    if Path(name).is_dir():
        if len(data) > 1:
            raise UsageError("a folder is measured on one data set: pass --data once.\n  Nothing was sent.")
        tag = next(iter(data), "")
        package = package_folder(
            name, repo_id, licence=args.license or "", base_model=args.base_model or "", dataset=tag
        )
    else:
        package = package_row(name, repo_id)
        tag = package.facts.dataset
    folder = data.get(tag) or data.get("")
    if not folder:
        wanted = f"--data {tag}=DIR" if tag else "--data DIR"
        raise UsageError(
            f"{name} cannot be published without measuring it again.\n"
            f"  expected  {wanted}, with one folder per class in DIR/{args.split}\n"
            "  Nothing was sent."
        )
    with progress_bar(f"{name} on {args.split}") as progress:
        return check_package(package, folder, args.split, progress)


def report(
    packages: list[Package], results: list[Published | ChanzooError], args: argparse.Namespace
) -> None:
    """Print what became of every package; in a checkout, write the revisions of rows into the table."""
    from ..hub.publish import is_checkout, record

    data: list[dict[str, Any]] = []
    table: list[tuple[str, ...]] = []
    recorded = False
    for package, result in zip(packages, results, strict=True):
        entry: dict[str, Any] = {"name": package.name, "repo": package.repo_id, "sha256": package.sha256}
        if isinstance(result, ChanzooError):
            entry |= {"state": "FAILED", "revision": "", "error": str(result)}
        else:
            state = "dry run" if args.dry_run else "published" if result.changed else "unchanged"
            entry |= {"state": state, "revision": result.revision, "error": ""}
            if package.row and result.revision:
                recorded = record(package.row, result) or recorded
        entry |= {"metrics": package.metrics, "files": []}
        listed = package.listed
        entry["files"] = [{"path": f.path, "bytes": f.size_bytes, "sha256": f.sha256} for f in listed]
        data.append(entry)
        if args.dry_run:
            table += [(package.repo_id, f.path, human_bytes(f.size_bytes), f.sha256) for f in listed]
        else:
            cells = (entry["name"], entry["repo"], entry["state"], entry["revision"], entry["sha256"])
            table.append(cells)
    headers = ("name", "repository", "state", "revision", "sha256")
    if args.dry_run:
        headers = ("repository", "file", "size", "sha256")
    emit(data, args.format == "json", headers, table)
    for result in results:
        if isinstance(result, ChanzooError):
            say(f"chanzoo: {result}")
    if args.dry_run:
        say("Dry run: everything was checked, nothing was sent.")
    elif recorded:
        say("chanzoo/weights.json names the revisions.   Build the cards anew: python scripts/build_cards.py")
    elif any(package.row for package in packages) and not is_checkout():
        say("The table belongs to the installed package and was not changed.")
