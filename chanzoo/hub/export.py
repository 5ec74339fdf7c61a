"""Files for other runtimes: ONNX and ``torch.export``, compared with the network before they are kept.

The batch size stays free; height and width on request. What was written is loaded back and has to give the
outputs of the network as it was before folding; only then does the file get its name.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn

from ..errors import ChanzooError, UsageError
from ..layers.equilibrium import ChannelEquilibrium
from ..measure.images import data_config

__all__ = ["FORMATS", "TOLERANCE", "Exported", "Format", "Trial", "check_target", "export_network"]

TOLERANCE = 1e-3  # of the largest output: folding and another runtime's sums stay below 1e-5
METADATA_FILE = "chanzoo.json"  # inside a .pt2 archive
ONNX_LIMIT_BYTES = 2_000_000_000  # a protobuf message holds less than 2 GiB
_STEPS = 4
_AXES = ("batch", "channels", "height", "width")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Trial:
    """Outputs of the written file and of the network for the same images.

    Attributes:
        shape: Of the images, ``(b, c, h, w)``.
        difference: The largest, absolute.
        largest: Largest magnitude among the network's outputs.
    """

    shape: tuple[int, ...]
    difference: float
    largest: float

    @property
    def relative(self) -> float:
        """The difference as a share of the largest output."""
        if not self.difference:
            return 0.0
        return self.difference / self.largest if self.largest else math.inf


@dataclass(frozen=True)
class Exported:
    """A file that was written and compared.

    Attributes:
        path: The file.
        file_bytes: Its size.
        inputs: Shape of the images, with names for what is free.
        outputs: Shape of the outputs, likewise.
        opset: Of ONNX; None in other formats.
        norms_folded: Batch norms that went into the convolutions before them.
        norms_left: Batch norms that are still there.
        layers_merged: Channel Equilibrium layers that were merged.
        trials: What was compared.
        seconds: All of it.
    """

    path: Path
    file_bytes: int
    inputs: tuple[str | int, ...]
    outputs: tuple[str | int, ...]
    opset: int | None
    norms_folded: int
    norms_left: int
    layers_merged: int
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def worst(self) -> Trial:
        """The trial with the largest relative difference."""
        return max(self.trials, key=lambda trial: trial.relative)


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: Of its name.
        needs: Modules of the extra ``export`` without which it cannot be written and compared.
        limit_bytes: Of parameters and buffers; None without a limit.
        encode: Makes the bytes from a program, its metadata and an opset; gives them and their opset.
        load: Opens such a file, as a function from images to outputs.
    """

    suffix: str
    needs: tuple[str, ...]
    limit_bytes: int | None
    encode: Callable[[Any, Mapping[str, Any], int | None], tuple[bytes, int | None]]
    load: Callable[[Path], Callable[[Tensor], Tensor]]


def check_target(path: Path, format: str, *, opset: int | None = None, overwrite: bool = False) -> None:
    """Refuse, before any work, a file that could not be written at its end.

    Args:
        path: The file.
        format: Key of :data:`FORMATS`.
        opset: Of ONNX; None for the exporter's own.
        overwrite: Whether it may be there already.

    Raises:
        UsageError: A package is missing, there is no such opset, the name ends in something else, it is a
            folder or there already, or its folder is missing or not writable.
    """
    kind = FORMATS[format]
    missing = []
    for name in kind.needs:
        try:
            import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UsageError(
            f"--format {format} needs {', '.join(missing)}, which is not installed.\n"
            '  Nothing was exported.   Install it: python -m pip install "chanzoo[export]"'
        )
    if opset is not None:
        _check_opset(format, opset)
    if os.path.isdir(path):  # pathlib's raise for a name that is too long
        raise UsageError(f'"{path}" is a folder; name a file.')
    if path.suffix != kind.suffix:
        raise UsageError(f'"{path}" has another ending than {kind.suffix}, that of --format {format}.')
    if not os.path.isdir(path.parent):
        raise UsageError(f'no folder "{path.parent}".\n  Nothing was exported.')
    if os.path.exists(path) and not overwrite:
        raise UsageError(f'"{path}" is there already.\n  Nothing was exported.   Replace it: --force')
    with _partial(path):
        pass


def export_network(
    model: nn.Module,
    path: Path,
    format: str,
    *,
    size: tuple[int, int] | None = None,
    dynamic_size: bool = False,
    batch: int = 3,
    fold: bool = True,
    opset: int | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a network for another runtime, load it back, compare, and keep the file if it agrees.

    Args:
        model: A timm network in evaluation mode on the CPU; not changed.
        path: The file; there with everything or not at all.
        format: Key of :data:`FORMATS`.
        size: Height and width of the images; those of the network's config by default.
        dynamic_size: Leave height and width free.
        batch: A batch size to compare at, beside 1.
        fold: Fold batch norms and merge Channel Equilibrium layers first.
        opset: Of ONNX; the exporter's own by default.
        overwrite: Whether the file may be there already.
        metadata: Facts for the file, beside the size, mean, crop and so on of its images.
        progress: Called with steps done and steps in all.

    Raises:
        UsageError: See :func:`check_target`; or the network takes no images of that size, gives something
            else than one tensor, or is too large for the format.
        ChanzooError: It cannot be exported, or the file does not compute what the network computes; what
            was at ``path`` is untouched.
    """
    start = time.perf_counter()
    report = progress or (lambda done, total: None)
    kind = FORMATS[format]
    check_target(path, format, opset=opset, overwrite=overwrite)
    if model.training:
        raise UsageError("only a network in evaluation mode can be exported: call model.eval() first.")
    _check_bytes(model, format)
    config = data_config(model)
    channels, *own_size = config["input_size"]
    height, width = size or own_size
    shapes = [(1, channels, height, width), (batch, channels, height, width)]
    advice = ["Choose another: --img-size H W"] * 2
    if dynamic_size:
        shapes.append((1, channels, 2 * height, 3 * width))
        advice.append("Leave --dynamic-size out")
    images = [_images(shape) for shape in shapes]
    expected = [_outputs(model, x, text) for x, text in zip(images, advice, strict=True)]

    facts = {**config, "input_size": (channels, height, width), **(metadata or {})}
    folded = reparameterize_model(model) if fold else model
    with _partial(path) as partial, _quiet():
        report(0, _STEPS)
        try:
            program = _trace(folded, channels, (height, width), dynamic_size)
            inputs, outputs = _named_shapes(program)
            report(1, _STEPS)
            data, opset = kind.encode(program, facts, opset)
        except ChanzooError:
            raise
        except Exception as error:  # the exporters raise whatever they met
            raise _not_exported(model, format, dynamic_size, error) from error
        partial.write_bytes(data)
        report(2, _STEPS)
        try:
            run = kind.load(partial)
            report(3, _STEPS)
            found = [run(x) for x in images]
        except Exception as error:
            raise _not_exported(model, format, dynamic_size, error) from error
        trials = tuple(map(_compare, found, expected, shapes))
        _check_trials(trials, path)
        partial.replace(path)
    report(_STEPS, _STEPS)
    return Exported(
        path=path,
        file_bytes=len(data),
        inputs=inputs,
        outputs=outputs,
        opset=opset,
        norms_folded=_count(model, _NORMS) - _count(folded, _NORMS),
        norms_left=_count(folded, _NORMS),
        layers_merged=_count(model, ChannelEquilibrium) - _count(folded, ChannelEquilibrium),
        trials=trials,
        seconds=time.perf_counter() - start,
    )


def _count(model: nn.Module, kinds: Any) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that is gone afterwards, unless it was renamed."""
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        partial.touch()
    except OSError as error:
        raise UsageError(f'cannot write "{path}": {error.strerror}.\n  Nothing was exported.') from error
    try:
        yield partial
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of each other's versions and log what they raise as well."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _check_opset(format: str, opset: int) -> None:
    if format != "onnx":
        raise UsageError(f"--opset belongs to --format onnx; {format} has none.")
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UsageError(f"--opset {opset} is newer than the installed onnx, which knows up to {newest}.")


def _check_bytes(model: nn.Module, format: str) -> None:
    total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    limit = FORMATS[format].limit_bytes
    if limit is not None and total > limit:
        raise UsageError(
            f"a file of --format {format} holds at most {limit:,} bytes of weights; "
            f"this network has {total:,}.\n  Nothing was exported.   Take another: --format torch-export"
        )


def _images(shape: Sequence[int]) -> Tensor:
    """Random images, normalised ones in effect; the same ones in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor, advice: str) -> Tensor:
    """What the network makes of images, as a check of their size too."""
    size = "×".join(map(str, x.shape[1:]))
    try:
        out = model(x)
    except Exception as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{type(model).__name__} takes no images of {size}: {text}\n  Nothing was exported.   {advice}"
        ) from error
    if not isinstance(out, Tensor) or not out.dim() or out.shape[0] != x.shape[0]:
        raise UsageError(
            f"{type(model).__name__} gives {type(out).__name__}: expected one tensor with a row per image.\n"
            "  Nothing was exported."
        )
    if not out.isfinite().all():
        raise ChanzooError(
            f"the network's outputs are not finite for random images of {size}; nothing can be compared.\n"
            "  Nothing was exported."
        )
    return out


def _trace(model: nn.Module, channels: int, size: tuple[int, int], dynamic_size: bool) -> Any:
    """The network as a graph with a free batch size."""
    from torch.export import Dim, export

    free: dict[int, Any] = {0: Dim("batch", min=1)}
    if dynamic_size:  # nameless: a named one must hold for every number, and a net of stride 32 wants more
        free |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad():
        # Of two images: the exporter takes a dimension of 1 for a fixed one.
        program = export(model, (_images((2, channels, *size)),), dynamic_shapes=(free,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # folders of this machine are nobody's business
    return program


def _named_shapes(program: Any) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
    """Shapes of a program's images and outputs, with names for what is free."""
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    images = nodes[program.graph_signature.user_inputs[0]]
    outputs = nodes[program.graph_signature.user_outputs[0]]
    names = {str(n): word for n, word in zip(images.shape, _AXES, strict=True) if not isinstance(n, int)}

    def named(shape: Any) -> tuple[str | int, ...]:
        return tuple(n if isinstance(n, int) else names.get(str(n), str(n)) for n in shape)

    return named(images.shape), named(outputs.shape)


def _compare(found: Tensor, expected: Tensor, shape: Sequence[int]) -> Trial:
    if found.shape != expected.shape:
        difference = math.inf
    else:
        difference = (found.double() - expected.double()).abs().max().item()
    return Trial(tuple(shape), difference, expected.abs().max().item())


def _check_trials(trials: Sequence[Trial], path: Path) -> None:
    """Refuse a file whose outputs differ; nothing that is not a number passes."""
    for trial in trials:
        if not trial.difference <= TOLERANCE * trial.largest:
            raise ChanzooError(
                "the exported file does not compute what the network computes.\n"
                f"  expected  at most {TOLERANCE:g} of the largest output, which is {trial.largest:.4g}\n"
                f"  found     {trial.difference:.4g} for images of {'×'.join(map(str, trial.shape))}\n"
                f'  The file was not kept; "{path}" is untouched.'
            )


def _not_exported(model: nn.Module, format: str, dynamic_size: bool, error: BaseException) -> ChanzooError:
    """The error for what an exporter or a runtime did not manage, with the first cause in one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    advice = "It may do so without --dynamic-size." if dynamic_size else "All of it: --debug"
    return ChanzooError(
        f"{type(model).__name__} does not export to {format}: {text[:200]}\n"
        f"  The file was not written; what was there is untouched.   {advice}"
    )


def _encode_onnx(program: Any, facts: Mapping[str, Any], opset: int | None) -> tuple[bytes, int | None]:
    import onnx

    # torch's translation of this operation takes no number that depends on the size of the image.
    if any(isinstance(node.kwargs.get("value"), torch.fx.Node) for node in program.graph.nodes):
        program = program.run_decompositions({torch.ops.aten.addcmul.default: _addcmul})
    free = {axis: name for axis, name in enumerate(_named_shapes(program)[0]) if isinstance(name, str)}
    done: Any = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["outputs"],
        dynamic_shapes=(free,),
        opset_version=opset,
        verbose=False,
    )
    proto = done.model_proto
    graph = proto.graph
    # What the exporter notes of its own work is more than the graph itself.
    for item in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        del item.metadata_props[:]
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items() if v is not None}
    onnx.helper.set_model_props(proto, texts)
    found = next(item.version for item in proto.opset_import if item.domain == "")
    if opset not in (None, found):
        raise ChanzooError(
            f"this network cannot be written in opset {opset}; {found} is what the exporter made of it.\n"
            f"  The file was not written; what was there is untouched.   Try --opset {found}"
        )
    return proto.SerializeToString(deterministic=True), found


def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return x + a * b * value


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # its errors are raised as well
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _encode_torch(program: Any, facts: Mapping[str, Any], _opset: int | None) -> tuple[bytes, int | None]:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(facts)})
    return buffer.getvalue(), None


def _load_torch(path: Path) -> Callable[[Tensor], Tensor]:
    run = torch.export.load(path).module()

    @torch.no_grad()
    def outputs(x: Tensor) -> Tensor:
        return run(x)

    return outputs


FORMATS = {
    "onnx": Format(
        ".onnx", ("onnx", "onnxruntime", "onnxscript"), ONNX_LIMIT_BYTES, _encode_onnx, _load_onnx
    ),
    "torch-export": Format(".pt2", (), None, _encode_torch, _load_torch),
}
