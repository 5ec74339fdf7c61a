"""Condensing while training, in any loop, and the condensed network afterwards.

CondenseNet V2 (CVPR 2021, arXiv:2104.04382) drops connections in the first half of training. The position is
kept in the network, so it travels with checkpoints and copies, and any loop that calls the network trains it.
Differences from the authors' code: the position is no class attribute, a stage that was passed over is caught
up, and nothing happens in evaluation.
"""

# No postponed annotations here: scripting needs the types of a module's tensors, not their names.

import copy
import logging
import weakref
from typing import Any

import torch
from timm.layers import is_scriptable
from torch import Tensor, nn

from ..errors import UsageError
from .learned_group import CondensedConv2d, CondensedReactivation, LearnedGroupConv2d, SparseReactivation

__all__ = [
    "CondensingProgress",
    "check_form",
    "condense",
    "condensing_stage",
    "follow_progress",
    "is_condensed",
    "learned_layers",
    "reset_progress",
]

_logger = logging.getLogger(__name__)
_LEARNED = (LearnedGroupConv2d, SparseReactivation)
_CONDENSED = (CondensedConv2d, CondensedReactivation)


def condensing_stage(progress: float, condensation_factor: int) -> int:
    """How many of the C − 1 drops are due.

    Args:
        progress: Share of training that is done, from 0.
        condensation_factor: The paper's C.

    Source:
        arXiv:2104.04382, section 4: a drop every T / 2(C − 1) epochs of T, the last at half of it.

    Example:
        >>> [condensing_stage(p, 4) for p in (0, 0.2, 0.4, 0.5, 1)]
        [0, 1, 2, 3, 3]
    """
    drops = condensation_factor - 1
    return sum(2 * progress >= t / drops for t in range(1, drops + 1))


def learned_layers(model: nn.Module) -> dict[str, LearnedGroupConv2d | SparseReactivation]:
    """The layers of a network that learn which connections they need, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _LEARNED)}


def is_condensed(model: nn.Module) -> bool:
    """Whether every layer that learns its connections has dropped all it has to."""
    return all(layer.is_condensed() for layer in learned_layers(model).values())


def check_form(model: nn.Module, state_dict: dict[str, Any], prefix: str = "", *_: Any) -> None:
    """Check that tensors and network have the same form, before any is loaded; a hook for that.

    Raises:
        UsageError: One is condensed, the other is not.
    """
    for name, module in model.named_modules():
        if isinstance(module, _CONDENSED) and f"{prefix}{name}.mask" in state_dict:
            raise UsageError(
                f"the tensors are of the training form, {type(model).__name__} was built condensed.\n"
                "  Nothing was loaded.   Condense them first (chanzoo condense), or build it without "
                "condensed=True"
            )
        if isinstance(module, _LEARNED) and f"{prefix}{name}.index" in state_dict:
            by_itself = getattr(model, "learns_connections", False)
            raise UsageError(
                f"the tensors are of the condensed form, {type(model).__name__} was built to be trained.\n"
                f"  Nothing was loaded.   {'Build it' if by_itself else 'Use add_reactivation'} with "
                "condensed=True"
            )


class CondensingProgress(nn.Module):
    """Counts the training forwards of a network and condenses its layers when a stage is due.

    Attributes:
        train_step: Scalar of int64: training forwards so far; part of the state dict.
        planned_steps: Scalar of int64: the ``total_steps`` that they were counted towards, 0 for none; part
            of the state dict.
        total_steps: Training forwards in all: epochs × batches per epoch and process. None leaves the masks
            alone.
    """

    train_step: Tensor
    planned_steps: Tensor

    def __init__(self, total_steps: int | None = None, device: Any = None) -> None:
        """Start at zero.

        Raises:
            UsageError: ``total_steps`` is no whole number above 0.
        """
        super().__init__()
        self.total_steps = _checked(total_steps)
        for name in ("train_step", "planned_steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        self._step: int | None = None  # the buffer's value, known without waiting for a device
        self._stages: dict[int, int] = {}  # C → stage that the layers have been brought to
        self._epoch_start: int | None = None
        self._end: dict[str, int] | None = None
        self._is_early = True  # whether the end has not been passed in this run
        if total_steps and is_scriptable():
            _logger.warning(
                "total_steps=%d: a scripted network does not count its training, so it drops no connections. "
                "Train it unscripted.",
                total_steps,
            )
        self.register_load_state_dict_post_hook(_forget)

    @torch.compiler.disable
    def tick(self, model: nn.Module) -> None:
        """Count one training forward of ``model``, after dropping what is due; for its beginning.

        Nothing happens in evaluation, without gradients (when statistics of norms are measured anew), or
        without ``total_steps``.
        """
        if not self.total_steps or not self.training or not torch.is_grad_enabled():
            return
        if self._step is None or not self._stages:
            self._start(model)
        step, total = self._step or 0, self.total_steps
        for factor, reached in self._stages.items():
            stage = condensing_stage(step / total, factor)
            if stage > reached:
                for layer in learned_layers(model).values():
                    if layer.condensation_factor == factor:
                        layer.condense_to(stage)
                self._stages[factor], self._is_early = stage, True
                _logger.info(
                    "step %d of %d: stage %d of %d, %d of %d connections are left",
                    *(step, total, stage, factor - 1, factor - stage, factor),
                )
        if step >= total and self._is_early:
            self._is_early = False
            _logger.warning(
                "training goes on after total_steps=%d: it is longer than said, and every connection was "
                "dropped too early. total_steps is epochs × batches per epoch.",
                total,
            )
        self._step = step + 1
        self.train_step += 1
        assert self._end is not None
        self._end |= {"step": self._step, "stage": self._stages.get(self._end["factor"], 0)}

    def forward(self, x: Any) -> Any:
        """Hand on what comes: a container (``Sequential``, timm's ``features_only``) runs all its parts."""
        return x

    def train(self, mode: bool = True) -> "CondensingProgress":
        """Set the mode; the end of an epoch shows whether ``total_steps`` is a number of epochs."""
        if self.training and not mode and self._step is not None and self.total_steps:
            start, self._epoch_start = self._epoch_start, None
            length = self._step - (start or 0)
            if start is not None and length > 0 and self._drops_are_left():
                self._say_epochs(length)
        return super().train(mode)

    def _drops_are_left(self) -> bool:
        return any(stage < factor - 1 for factor, stage in self._stages.items())

    def _say_epochs(self, length: int) -> None:
        """What ``total_steps`` means if an epoch has ``length`` batches."""
        total = self.total_steps or 0
        if total % length:
            _logger.warning(
                "total_steps=%d is %.2f times the %d training batches before this evaluation. If that "
                "was an epoch, drops come at the wrong time: total_steps is epochs × batches per epoch.",
                *(total, total / length, length),
            )
            return
        first = -(-total // (2 * (max(self._stages) - 1)))
        _logger.info(
            "total_steps=%d stands for %d epochs of %d batches: the first connections are dropped in epoch "
            "%d, the last in epoch %d, counted from 0",
            *(total, total // length, length, first // length, -(-total // 2) // length),
        )

    def _start(self, model: nn.Module) -> None:
        """Take the position from the buffer, after building, loading or moving."""
        total = self.total_steps or 0
        self._step = step = int(self.train_step)
        self._epoch_start = self._step if self._end is None else None
        self._stages = {}
        for layer in learned_layers(model).values():
            factor, stage = layer.condensation_factor, int(layer.stage)
            self._stages[factor] = min(stage, self._stages.get(factor, stage))
        self._is_early = step < total
        planned = int(self.planned_steps)
        if step and planned not in (0, total) and self._drops_are_left():
            _logger.warning(
                "%d training forwards were counted towards total_steps=%d (%.0f %%), which is %d now "
                "(%.0f %%). If an epoch has another number of batches than before, set progress.train_step "
                "to %d.",
                *(step, planned, 100 * step / planned, total, 100 * step / total, step * total // planned),
            )
        self.planned_steps.fill_(total)
        if self._end is None:
            self._end = {}
            weakref.finalize(self, _warn_unfinished, self._end)
        self._end |= {"step": step, "total": total, "factor": max(self._stages, default=1), "stage": 0}

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes its position from the buffers, and says itself if its training ends too early."""
        return {**self.__dict__, "_step": None, "_stages": {}, "_epoch_start": None, "_end": None}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # pyright: ignore
        """Load; ``planned_steps`` may be missing."""
        state_dict.setdefault(f"{prefix}planned_steps", torch.zeros_like(self.planned_steps))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _checked(total_steps: Any) -> int | None:
    """``total_steps``, unless it is no number of steps."""
    if total_steps is not None and (type(total_steps) is not int or total_steps < 1):
        raise UsageError(
            f"total_steps={total_steps!r}: expected a whole number above 0 (epochs × batches).\n"
            "  Nothing was built."
        )
    return total_steps


def _forget(progress: CondensingProgress, _keys: Any) -> None:
    """Read the position anew after a checkpoint was loaded."""
    progress._step, progress._stages = None, {}


def _warn_unfinished(end: dict[str, int]) -> None:
    """Say at the end that the network cannot be condensed yet."""
    if end["total"] and end["stage"] < end["factor"] - 1:
        _logger.warning(
            "training ended at step %d of total_steps=%d, at stage %d of %d: the network is not condensed. "
            "Resume it, or start with the right total_steps.",
            *(end["step"], end["total"], end["stage"], end["factor"] - 1),
        )


def follow_progress(model: nn.Module, total_steps: int | None) -> None:
    """Let a network of one's own condense its layers while it trains; adds the part ``progress`` to it.

    Call it again with another ``total_steps`` to change that. Networks of ours take ``total_steps`` when they
    are built.

    Args:
        model: A network with layers that learn their connections.
        total_steps: As of :class:`CondensingProgress`.

    Raises:
        UsageError: It has no such layers, or has a part of that name already.
    """
    device = next((layer.weight.device for layer in learned_layers(model).values()), None)
    if device is None:
        raise UsageError(f"{type(model).__name__} has no layer that learns its connections.")
    earlier: Any = getattr(model, "progress", None)
    if earlier is not None and not isinstance(earlier, CondensingProgress):
        raise UsageError(f'{type(model).__name__} has a part "progress" of its own.\n  Nothing was changed.')
    if earlier is not None:
        earlier.total_steps = _checked(total_steps)
        _forget(earlier, None)
        return
    progress = CondensingProgress(total_steps, device).train(model.training)
    if not hasattr(model, "progress"):  # else its class counts as soon as it has something to count with
        model.register_forward_pre_hook(_tick)
    model.progress = progress


def _tick(model: Any, _args: Any) -> None:
    progress = model.progress
    if isinstance(progress, CondensingProgress) and model.training:  # it goes when the network is condensed
        progress.tick(model)  # pyright: ignore[reportCallIssue]  # it takes torch's decorator for a class


@torch.no_grad()
def reset_progress(model: nn.Module) -> None:
    """Start condensing from the beginning: all connections are back, the count is zero; weights stay.

    Raises:
        UsageError: The network has nothing to count with.
    """
    if not isinstance(progress := getattr(model, "progress", None), CondensingProgress):
        raise UsageError(f"{type(model).__name__} does not count its training: see follow_progress.")
    progress.train_step.zero_()
    _forget(progress, None)
    for layer in learned_layers(model).values():
        layer.mask.fill_(True)
        layer.stage.zero_()


def condense(model: nn.Module) -> nn.Module:
    """The condensed form of a trained network: grouped convolutions and indices in the place of masks.

    Args:
        model: Any network with layers that learn their connections; left as it is.

    Returns:
        A copy that computes the same with fewer multiply-adds, in the same mode.

    Raises:
        UsageError: A layer has not dropped all it has to, or there is none. Names the layer.

    Source:
        arXiv:2104.04382, section 3.3.
    """
    layers = learned_layers(model)
    if not layers:
        is_done = any(isinstance(module, _CONDENSED) for module in model.modules())
        why = "is condensed already" if is_done else "has no layer that learns its connections"
        raise UsageError(f"{type(model).__name__} {why}: there is nothing to condense.")
    small = {}
    for name, layer in layers.items():
        try:
            small[id(layer)] = layer.condensed()
        except UsageError as error:
            raise UsageError(
                f'layer "{name}" cannot be condensed: {error}\n  The network is unchanged.'
            ) from error
    memo: dict[int, Any] = dict(small)
    for parent in model.modules():
        runs_all = isinstance(parent, (nn.Sequential, nn.ModuleDict))  # and could not run None
        for part in parent.children():
            if isinstance(part, CondensingProgress):
                memo[id(part)] = nn.Identity() if runs_all else None
    network: Any = copy.deepcopy(model, memo)
    if callable(note := getattr(network, "note_condensed", None)):
        note()
    return network
