"""What the loopback Hub keeps: repositories of commits of files, and its opinion of a model card."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

LARGE_SUFFIXES = (".safetensors", ".bin", ".onnx")
LARGE_BYTES = 10_000_000


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that says no, in the headers that the client turns into its classes of errors."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers |= {"Content-Type": "application/json", "X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self.answer = Answer(json.dumps({"error": message}).encode(), status, headers)


def is_large(path: str, size: int) -> bool:
    """Whether a file goes to the storage; an empty one never does."""
    return size > 0 and (path.endswith(LARGE_SUFFIXES) or size > LARGE_BYTES)


class File:
    """The bytes of one file, and the names that git and its large file storage give them."""

    def __init__(self, path: str, data: bytes) -> None:
        self.data = data
        self.is_large = is_large(path, len(data))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in place of a large file."""
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}")
        return "\n".join([*lines, f"size {len(self.data)}\n"]).encode()

    @cached_property
    def git_oid(self) -> str:
        blob = self.pointer if self.is_large else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def oid(self) -> str:
        """By which the client tells whether its own file is the same."""
        return self.sha256 if self.is_large else self.git_oid

    def info(self, path: str) -> dict[str, Any]:
        info: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_oid}
        if self.is_large:
            info["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return info


def folder_info(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


class Repo:
    """Commits in the order they were made, and the names of some."""

    def __init__(self, repo_id: str, private: bool) -> None:
        self.repo_id = repo_id
        self.private = private
        self.created = time.gmtime()
        self.commits: dict[str, dict[str, File]] = {}
        self.branches: dict[str, str] = {}  # also of pull requests: refs/pr/1
        self.tags: dict[str, str] = {}

    @property
    def pulls(self) -> dict[str, str]:
        return {name: oid for name, oid in self.branches.items() if name.startswith("refs/pr/")}

    def resolve(self, revision: str) -> str:
        """The commit of a branch, of a tag, or of the beginning of its own name."""
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for oid in self.commits:
                if oid.startswith(revision):
                    return oid
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def head(self, branch: str) -> str:
        """The last commit of a branch, "" of main before there is any."""
        if branch in self.branches:
            return self.branches[branch]
        if branch == "main" and not self.commits:
            return ""
        raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")

    def add(self, files: dict[str, File], branch: str, parent: str) -> str:
        """Make a commit that holds these files, the new head of a branch."""
        listing = "".join(f"{path} {file.git_oid}\n" for path, file in sorted(files.items()))
        text = f"{self.repo_id} {len(self.commits)} {parent}\n{listing}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


def read_card(text: str) -> tuple[dict[str, Any], list[str]]:
    """The front matter of a model card, and what the Hub does not accept in it."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    if not match:
        return {}, []
    try:
        card = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return {}, [f"YAML Metadata Error: {' '.join(str(error).split())}"]
    if card is None:
        return {}, []
    if not isinstance(card, dict):
        return {}, ["YAML Metadata Error: the metadata must be an object"]
    errors = [
        f'"{key}" must be a string'
        for key in ("library_name", "pipeline_tag")
        if not isinstance(card.get(key, ""), str)
    ]
    if "license" in card and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(card["license"])):
        errors.append('"license" must be one of the identifiers the Hub knows')
    for key, pattern in (
        ("tags", ".+"),
        ("datasets", r"[\w.-]+(/[\w.-]+)?"),
        ("base_model", r"[\w.-]+/[\w.-]+"),
    ):
        for index, value in enumerate(_as_list(card.get(key))):
            if not isinstance(value, str) or not re.fullmatch(pattern, value):
                errors.append(f'"{key}[{index}]" with value {json.dumps(value, default=str)} is not valid')
    for index, model in enumerate(_as_list(card.get("model-index"))):
        missing = [name for name in ("name", "results") if not isinstance(model, dict) or name not in model]
        errors += [f'"model-index[{index}].{name}" is required' for name in missing]
    return card, errors


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
