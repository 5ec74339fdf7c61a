"""``chanzoo publish``: what it prints, where it stops, and what it leaves in the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from timm.models import save_for_hf

from chanzoo import weights
from chanzoo.weights import load_rows
from tests.hub.server import Fault, Hub
from tests.hub.shelf import NAME, Shelf, make_shelf

# timm's reader leaves the closing of files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture
def shelf(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    return make_shelf(tmp_path / "checkout", images, monkeypatch)


@pytest.fixture
def token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub.token


def test_a_weight(cli, hub: Hub, shelf: Shelf, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = cli("publish", NAME, "--to", "zoo/net", "--data", f"c10j={shelf.images}")
    revision = hub.commits("zoo/net")[-1]
    assert done.code == 0
    header, line = (text.split() for text in done.out.splitlines())
    assert header == ["name", "repository", "state", "revision", "sha256"]
    assert line == [NAME, "zoo/net", "published", revision, shelf.row.sha256]
    assert done.err == (
        "chanzoo/weights.json names the revisions.   Build the cards anew: python scripts/build_cards.py\n"
    )
    assert load_rows(weights.TABLE)[NAME] == replace(shelf.row, hub_repo="zoo/net", revision=revision)
    assert token not in done.out + done.err
    args = ("publish", NAME, "--to", "zoo/net", "--data", shelf.images, "--format", "json")
    again = json.loads(cli(*args).out)[0]
    assert (again["state"], again["revision"], again["error"]) == ("unchanged", revision, "")
    assert again["metrics"] == shelf.row.metrics
    monkeypatch.setattr("chanzoo.hub.publish.is_checkout", lambda: False)
    assert cli(*args).err == "The table belongs to the installed package and was not changed.\n"


def test_a_dry_run(cli, hub: Hub, shelf: Shelf) -> None:
    args = ("publish", NAME, "--to", "zoo/net", "--data", shelf.images, "--dry-run")
    done = cli(*args)
    assert (done.code, done.err) == (0, "Dry run: everything was checked, nothing was sent.\n")
    header, *lines = (text.split() for text in done.out.splitlines())
    assert header == ["repository", "file", "size", "sha256"]
    assert {line[1] for line in lines} == {
        "model.safetensors", "config.json", "README.md",
        "recipe.yaml", "summary.csv", "eval.json", "notes.md",
    }  # fmt: skip
    assert lines[0][:2] == ["zoo/net", "model.safetensors"] and lines[0][-1] == shelf.row.sha256
    data = json.loads(cli(*args, "--format", "json").out)
    assert (data[0]["state"], data[0]["files"][0]["bytes"]) == ("dry run", shelf.row.file_bytes)
    assert hub.requests == []
    assert load_rows(weights.TABLE)[NAME] == shelf.row


def test_a_folder(cli, hub: Hub, shelf: Shelf, token: str, tmp_path: Path) -> None:
    save_for_hf(timm.create_model("cifar_resnet20"), str(tmp_path / "net"), safe_serialization=True)
    args = ("publish", tmp_path / "net", "--to", "me/net", "--license", "mit", "--base-model", "me/old")
    done = cli(*args, "--data", shelf.images, "--private", "--format", "json")
    assert (done.code, done.err) == (0, "")
    [data] = json.loads(done.out)
    assert data["state"] == "published" and set(data["metrics"]) == {"top1", "top5"}
    assert hub.is_private("me/net")
    card = hub.files("me/net")["README.md"].decode()
    assert "license: mit" in card and "base_model: me/old" in card and "private" not in card


def test_everything(cli, hub: Hub, shelf: Shelf, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("publish", "--all", "--to", "zoo", "--data", f"c10j={shelf.images}")
    monkeypatch.setitem(
        weights.WEIGHTS, "cifar_resnet20.z_c10j", replace(shelf.row, name="cifar_resnet20.z_c10j")
    )
    refused = cli(*args)
    assert (refused.code, refused.out) == (2, "")
    assert "the file of cifar_resnet20.z_c10j is not on this machine" in refused.err
    assert hub.requests == [], "one that cannot go up keeps all of them here"
    monkeypatch.delitem(weights.WEIGHTS, "cifar_resnet20.z_c10j")
    hub.fail(Fault("status", path="/commit/", status=500, times=1))
    failed = cli(*args)
    assert failed.code == 4 and "FAILED" in failed.out
    assert (
        "chanzoo: cannot publish to zoo/cifar_resnet20.c10j: the Hub answered with status 500" in failed.err
    )
    assert cli(*args).code == 0
    assert load_rows(weights.TABLE)[NAME].hub_repo == f"zoo/{NAME}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((NAME, "--to", "zoo/net"), "cannot be published without measuring it again.\n  expected  --data"),
        ((NAME, "--to", "net", "--data", "."), '"net" cannot name a repository: expected ORG/REPO.'),
        (("--all", "--to", "zoo/net"), "--to zoo/net: with --all expected ORG alone, such as \"zoo\"."),
        ((NAME, "--all", "--to", "zoo"), "name one weight or folder, or pass --all."),
        ((NAME, "--to", "zoo/net", "--license", "mit"), "--license and --base-model are for a folder"),
        ((NAME, "--to", "zoo/net", "--data", "/nowhere"), 'no image folder "/nowhere".'),
        ((NAME, "--to", "zoo/net", "--data", "c9=."), 'no data set "c9"; there are: c10j'),
        (("nothing", "--to", "zoo/net", "--data", "."), 'no weights "nothing", and no such folder.'),
    ],
)  # fmt: skip
def test_wrong_usage(cli, hub: Hub, shelf: Shelf, token: str, args: tuple[str, ...], message: str) -> None:
    done = cli("publish", *args)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("chanzoo: ") and message in done.err
    assert hub.requests == []


def test_nobody_is_logged_in(cli, hub: Hub, shelf: Shelf) -> None:
    done = cli("publish", NAME, "--to", "zoo/net", "--data", shelf.images)
    assert done.code == 2 and "nobody is logged in to the Hub.\n  No file there was changed." in done.err
