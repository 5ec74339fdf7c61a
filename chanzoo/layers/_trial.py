"""A network run without memory: whether its widths fit together, and what it says about itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UsageError
from ._sizes import CONVS, form_of, indivisible, is_depthwise, resize, sizes_of, stems_of
from .decorrelation import BatchDecorrelation
from .equilibrium import ChannelEquilibrium

UNTOUCHED = "The network is unchanged."

_TRIAL_SIZE = 64  # pixels

# Where blocks and heads remember how many channels come in and go out, and what they agree with.
_INPUTS, _OUTPUTS = ("in_channels", "in_chs", "in_features"), ("out_channels", "out_chs")

# Layers that sort channels into groups of their own, of which there may be one, or one channel in each.
_OWN_GROUPS = (BatchDecorrelation, ChannelEquilibrium)


class MisfitError(Exception):
    """Why a network does not run."""


def name_of(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def ghost_of(model: nn.Module) -> Any:
    """A copy for evaluation that takes no memory."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        bare = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(bare, requires_grad=False) if is_parameter else bare
    return copy.deepcopy(model, memo).eval()


def first_trial(model: nn.Module) -> tuple[Trial, tuple[int, int]]:
    """Run the network as it is, on images of 64×64, its smallest or its own size."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    own = tuple(cfg.get("input_size") or (3, 224, 224))[-2:]
    least = tuple(cfg.get("min_input_size") or (1, 1))[-2:]
    small = (max(_TRIAL_SIZE, least[0]), max(_TRIAL_SIZE, least[1]))
    reason = ""
    for size in [own] if cfg.get("fixed_input_size") else [small, own]:
        trial = Trial(ghost_of(model))
        try:
            trial.run((int(size[0]), int(size[1])))
        except MisfitError as error:
            reason = str(error)
        else:
            return trial, (int(size[0]), int(size[1]))
    raise UsageError(
        f"{name_of(model)} cannot be narrowed: it is no CNN with timm's forward_features and forward_head.\n"
        f"  {reason}\n  {UNTOUCHED}"
    )


@dataclass
class Trial:
    """One run of a ghost, and what was seen.

    Attributes:
        ghost: Consumed by the run.
        full: The run of the full network, which this one has to resemble.
        outputs: Convolution → channels out. If given, each layer adapts to what it gets when first called;
            else one that gets what it does not expect is a misfit.
        features: Channels of the features.
        hidden: Inputs of the classifier.
        channels: Module name → channels in and out, of its last call.
        remembered: (module name, attribute) → value, for blocks that remember their channels.
        stretches: Per sum or product the module it happened in, and along which axes it was stretched.
        levels: Channels of each feature level.
    """

    ghost: Any
    full: Trial | None = None
    outputs: Mapping[str, int] | None = None
    features: int = 0
    hidden: int = 0
    channels: dict[str, tuple[int, int]] = field(default_factory=dict)
    remembered: dict[tuple[str, str], int] = field(default_factory=dict)
    stretches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    _running: list[tuple[str, nn.Module]] = field(default_factory=list)

    def run(self, size: tuple[int, int]) -> None:
        """Run the ghost on two images.

        Raises:
            MisfitError: It does not run, or not as the full network does.
        """
        for name, module in self.ghost.named_modules():
            module.register_forward_pre_hook(self._enter(name))
            module.register_forward_hook(self._leave(name))
        dtype = next((p.dtype for p in self.ghost.parameters()), torch.float32)
        stems = [m for n, m in self.ghost.named_modules() if n in stems_of(self.ghost)]
        channels = getattr(self.ghost, "in_chans", None) or (sizes_of(stems[0])[1] if stems else 3)
        x = torch.empty(2, channels, *size, device="meta", dtype=dtype)
        try:
            with torch.no_grad(), _Stretches(self):
                if hasattr(self.ghost, "forward_intermediates"):
                    maps, levels = self.ghost.forward_intermediates(x)
                    self.levels = [level.shape[1] for level in levels]
                else:
                    maps = self.ghost.forward_features(x)
                wanted = int(self.ghost.num_features)
                shape = list(maps.shape) if isinstance(maps, Tensor) else [type(maps).__name__]
                if len(shape) != 4 or (self.full is None and shape[1] != wanted):
                    raise MisfitError(f"its features are {shape}: expected maps [b, {wanted}, h, w].")
                self.features = maps.shape[1]
                self.hidden = self.ghost.forward_head(maps, pre_logits=True).shape[1]
                self.ghost.forward_head(maps)
                self._compare()
        except MisfitError:
            raise
        except Exception as error:  # whatever a network raises on tensors that do not fit
            name, module = self._running[-1] if self._running else ("", self.ghost)
            where = f'layer "{name}"' if name else "the network"
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise MisfitError(f"{where} ({type(module).__name__}) does not run: {text}") from error

    def level(self, index: int, info: dict[str, Any]) -> int | None:
        """Channels of a feature level."""
        if index < len(self.levels):
            return self.levels[index]
        into, out = self.channels.get(info.get("module", ""), (0, 0))
        return into if info.get("hook_type") == "forward_pre" else out

    def _compare(self) -> None:
        """A width of 1 fits everything, and means something else."""
        if self.full is None or len(self.stretches) != len(self.full.stretches):
            return
        for (name, axes), (_, expected) in zip(self.stretches, self.full.stretches, strict=True):
            if axes != expected:
                raise MisfitError(
                    f'layer "{name}" combines maps of one channel with maps of many, which the full network '
                    "does not."
                )

    def _enter(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            self._running.append((name, module))
            x = args[0] if args and isinstance(args[0], Tensor) else None
            if x is None or x.dim() < 2:
                return
            if self.outputs is not None and name not in self.channels:
                self._adapt(name, module, x, self.outputs)
            self._check_input(name, module, x)
            self.channels[name] = (x.shape[1], 0)
            self._remember(name, module, _INPUTS, 0)

        return hook

    def _leave(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], result: Any) -> None:
            self._running.pop()
            if isinstance(result, Tensor) and result.dim() > 1:
                self.channels[name] = (self.channels.get(name, (0, 0))[0], result.shape[1])
                self._remember(name, module, _OUTPUTS, 1)

        return hook

    def _adapt(self, name: str, module: Any, x: Tensor, outputs: Mapping[str, int]) -> None:
        old = sizes_of(module)
        if isinstance(module, nn.Linear):
            new = [old[0], x.shape[-1]]
        elif isinstance(module, CONVS):
            into = x.shape[1]
            out = into * old[0] // old[1] if is_depthwise(module) else outputs.get(name, old[0])
            new = [out, into]
        elif len(old) == 1:
            before = self.full.channels.get(name, (0, 0))[0] if self.full else 0
            new = [x.shape[1 if [before] == old else -1]]
        else:
            return
        if new == old:
            return
        if problem := indivisible(module, new):
            raise MisfitError(f'layer "{name}" ({type(module).__name__}) would have widths {new}: {problem}.')
        resize(module, new)
        block = self.ghost.get_submodule(name.rpartition(".")[0])
        if hasattr(block, "follow_widths"):
            block.follow_widths()

    def _check_input(self, name: str, module: nn.Module, x: Tensor) -> None:
        sizes = sizes_of(module)
        if isinstance(module, CONVS) and x.dim() == len(module.kernel_size) + 2:
            expected, found = sizes[1], x.shape[1]
        elif isinstance(module, nn.Linear):
            expected, found = sizes[1], x.shape[-1]
        elif isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and sizes:
            expected, found = sizes[0], x.shape[1]
        else:
            return
        if expected != found:
            raise MisfitError(
                f'layer "{name}" ({type(module).__name__}) gets {found} channels.\n'
                f"  expected  {form_of(module)} = {[*sizes[:-1], found]}\n  found     {sizes}"
            )

    def _remember(self, name: str, module: nn.Module, attributes: tuple[str, ...], side: int) -> None:
        if self.full is None or isinstance(module, (*CONVS, nn.Linear)):
            return
        for attribute in attributes:
            old, value = self.full.channels.get(name, (0, 0))[side], self.channels[name][side]
            if value != old and getattr(module, attribute, None) == old:
                setattr(module, attribute, value)
                self.remembered[name, attribute] = value


class _Stretches(TorchDispatchMode):
    """Notes along which axes the operands of sums and products are stretched."""

    _OPS = tuple(
        getattr(torch.ops.aten, name) for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")
    )

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, module = self.trial._running[-1] if self.trial._running else ("", self.trial.ghost)
        if (
            func.overloadpacket in self._OPS
            and not isinstance(module, _OWN_GROUPS)
            and len(args) > 1
            and all(isinstance(a, Tensor) for a in args[:2])
        ):
            a, b = (t.shape[::-1] for t in args[:2])
            axes = tuple(i for i, (m, n) in enumerate(zip(a, b, strict=False)) if (m == 1) != (n == 1))
            self.trial.stretches.append((name, axes))
        return func(*args, **(kwargs or {}))
