"""Cases of CondenseNet V2, all in 64-bit floats: layers, whole networks in both forms, and a training run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from fill import fill_tensor
from torch import Tensor, nn

from chanzoo.layers import CondensedConv2d, LearnedGroupConv2d, SparseReactivation, condense
from chanzoo.layers.condensing import condensing_stage, learned_layers
from chanzoo.macs import count_params
from chanzoo.models import condensenet_authors
from chanzoo.models.condensenet import CondenseNet
from chanzoo.models.shufflenetv2 import VARIANTS, ShuffleNetV2

_ACTS = {"ReLU": "relu", "HS": "hard_swish"}


def _layer(case: Any, **options: Any) -> Any:
    config = case.spec["config"]
    kind = {"LGC": LearnedGroupConv2d, "SFR": SparseReactivation}[case.spec["layer"]]
    layer = kind(
        config["in_channels"],
        config["out_channels"],
        config["groups"],
        config["condense_factor"],
        act_layer=_ACTS[config["activation"]],
        **options,
    )
    state = {key.replace("conv.weight", "weight"): value for key, value in case.state.items()}
    layer.load_state_dict({**layer.state_dict(), **state})
    return layer.double().eval()


def _mask(layer: Any) -> Tensor:
    """The mask at the weight's size."""
    return (layer.masked_weight() != 0).flatten(1)


def _update(layer: Any, x: Tensor) -> Tensor:
    """What the layer makes of new maps; of a reactivation, what it adds to the old ones."""
    if isinstance(layer, (LearnedGroupConv2d, CondensedConv2d)):
        return layer(x)
    return layer(x, torch.zeros(len(x), layer.out_channels, *x.shape[2:], dtype=x.dtype))


def layer_schedule(case: Any) -> dict[str, Tensor]:
    """A layer whose weights change between the drops. The authors' lasso stops at stage G − 1, not C − 1."""
    layer, spec, ours = _layer(case), case.spec, {}
    shape = list(layer.weight.shape)
    for i, (progress, seed) in enumerate(zip(spec["progress"], spec["weight_seeds"], strict=True)):
        with torch.no_grad():
            layer.weight.copy_(fill_tensor("conv.weight", shape, "float32", seed))
            layer.condense_to(condensing_stage(progress, layer.condensation_factor))
            alive = layer.alive().sum(dim=1)
            assert (alive == alive[0]).all()
            ours[f"output/mask/{i}"] = _mask(layer)
            ours[f"output/count/{i}"] = layer.candidates - alive[0]
            ours[f"output/stage/{i}"] = layer.stage.clone()
            ours[f"output/y/{i}"] = _update(layer, case.x.double())
            stopped = int(layer.stage) >= layer.groups - 1
            ours[f"output/lasso/{i}"] = layer.lasso_penalty() * (not stopped)
    return ours


def layer_backward(case: Any) -> dict[str, Tensor]:
    """One step in training, with the lasso's gradient added on the way back."""
    strength = case.spec["lasso_lambda"]
    layer = _layer(case, group_lasso=strength)
    layer.condense_to(len(case.spec["progress"]))
    layer.train()
    x = case.x.double().requires_grad_()
    y = _update(layer, x)
    y.square().mean().backward()
    penalty = layer.lasso_penalty()
    return {
        "output/mask": _mask(layer),
        "output/y": y,
        "output/lasso": penalty,
        "output/loss": y.square().mean() + strength * penalty,
        "output/grad_input": x.grad,
        "output/grad/conv.weight": layer.weight.grad,
        "output/grad/norm.weight": layer.norm.weight.grad,
        "output/grad/norm.bias": layer.norm.bias.grad,
        "output/running_mean": layer.norm.running_mean,
        "output/running_var": layer.norm.running_var,
    }


def layer_convert(case: Any) -> dict[str, Tensor]:
    """Both forms of a layer."""
    layer = _layer(case)
    layer.condense_to(len(case.spec["progress"]))
    small = layer.condensed()
    with torch.no_grad():
        ours = {f"output/converted/{key}": value for key, value in small.state_dict().items()}
        ours["output/converted/conv.weight"] = small.weight
        ours["output/mask"] = _mask(layer)
        ours["output/y"] = _update(layer, case.x.double())
        ours["output/y_converted"] = _update(small, case.x.double())
    ours["output/converted/slot_to_out"] = small.index
    if small.index.max() < len(small.index):
        ours["output/converted/index_matrix"] = torch.eye(len(small.index))[small.index]
    return ours


def build(case: Any, **options: Any) -> CondenseNet:
    """The network of a case, without its weights."""
    config = case.spec["config"]
    return CondenseNet(
        depths=config["stages"],
        growth=config["growth"],
        groups=config["group_1x1"],
        condensation_factor=config["condense_factor"],
        groups_3x3=config["group_3x3"],
        reactivation_groups=config["group_trans"],
        reactivation_factor=config["trans_factor"],
        bottleneck=config["bottleneck"],
        stem_stride=1 if config["dataset"].startswith("cifar") else 2,
        hard_swish_from=config["HS_start_block"],
        se_from=config["SE_start_block"],
        head_reduction=config["last_se_reduction"],
        head_width=config["fc_channel"],
        num_classes=config["num_classes"],
        **options,
    )


def _load(model: CondenseNet, case: Any) -> CondenseNet:
    state = case.state
    for key, shape, _ in case.spec.get("index_keys", ()):
        if len(shape) == 2:  # stored as the place of each row's one
            state[key] = torch.eye(shape[0])[state[key]]
    ours = condensenet_authors.from_authors(state, *model.lgc_sizes[:1], *model.sfr_sizes[:1])
    known = {key: value for key, value in model.state_dict().items() if "mask" in key or "stage" in key}
    model.load_state_dict(
        {**known, "progress.train_step": torch.tensor(0), **ours}, strict=not model.condensed
    )
    again = condensenet_authors.to_authors({**known, **ours})
    for key, value in state.items():
        if not torch.equal(again[key], value):
            raise ValueError(f"{key} does not come back from the converter")
    return model.double().eval()


def _outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            h, w = output.shape[2:]
            ours[f"output/{name}_center"] = output[:, :, h // 2, w // 2].clone()
            ours[f"output/{name}_mean"] = output.mean(dim=(2, 3))

        return hook

    for name, module in model.named_children():
        if name.startswith("stage"):
            module.register_forward_hook(keep(name.replace("stage", "block")))
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        features = model.forward_features(x.double())
        ours["output/pooled"] = features.mean(dim=(2, 3))
        ours["output/hidden"] = model.forward_head(features, pre_logits=True)
        ours["output/logits"] = model(x.double())
    return ours


def model(case: Any) -> dict[str, Tensor]:
    """A whole network in the training form and, if its masks are final, in the condensed one."""
    network = _load(build(case), case)
    if count_params(network) != case.spec["params"]:
        raise ValueError(f"{count_params(network)} parameters")
    if "b_" not in case.spec["model"] and case.spec["config"]["num_classes"] == 1000:
        assert condensenet_authors.find_variant(case.state) == case.spec["model"]
    layers = learned_layers(network)
    for layer in layers.values():
        layer.condense_to(len(case.spec["progress"]))
    ours = _outputs(network, case.x)
    for name, layer in layers.items():
        theirs = condensenet_authors.to_authors({f"{name}.stage": layer.stage})
        ours[f"output/mask/{next(iter(theirs)).removesuffix('._stage')}"] = layer.mask
    if "output/logits_converted" in case.spec["expected"]:
        small = condense(network)
        if count_params(small) != case.spec["params_converted"]:
            raise ValueError(f"{count_params(small)} parameters when condensed")
        again = build(case, condensed=True).double().eval()
        again.load_state_dict(small.state_dict())
        with torch.no_grad():
            ours["output/logits_converted"] = again(case.x.double())
    return ours


def converted_checkpoint(case: Any) -> dict[str, Tensor]:
    """A whole network from the layout of the authors' converted checkpoints."""
    network = _load(build(case, condensed=True), case)
    if count_params(network) != case.spec["params"]:
        raise ValueError(f"{count_params(network)} parameters")
    return _outputs(network, case.x)


def train_run(case: Any) -> dict[str, Tensor]:
    """A training run that condenses by its own count."""
    spec = case.spec
    steps, size, opt = spec["total_steps"], spec["batch_size"], spec["optimizer"]
    network = _load(build(case, total_steps=steps), case).train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=opt["lr"],
        momentum=opt["momentum"],
        nesterov=opt["nesterov"],
        weight_decay=opt["weight_decay"],
    )
    x = case.x.double()
    targets = (7 * torch.arange(len(x)) + 3) % 10
    ours: dict[str, Tensor] = {}
    losses, reached = [], 0
    for step in range(steps):
        rows = slice(step * size, (step + 1) * size)
        loss = F.cross_entropy(network(x[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        stages = {int(layer.stage) for layer in learned_layers(network).values()}
        assert len(stages) == 1
        if (stage := stages.pop()) > reached:
            reached = stage
            for name, layer in learned_layers(network).items():
                theirs = next(iter(condensenet_authors.to_authors({f"{name}.stage": layer.stage})))
                ours[f"output/mask/{theirs.removesuffix('._stage')}/stage{stage}"] = layer.mask.clone()
    with torch.no_grad():
        ours["output/final_logits"] = network.eval()(x[:size])
    ours["output/loss"] = torch.stack(losses)
    ours["output/final_weight/classifier"] = network.fc.weight
    ours["output/final_weight/stem"] = network.stem.weight
    return ours


def sfr_shufflenetv2(case: Any) -> dict[str, Tensor]:
    """ShuffleNet V2 with reactivation: torchvision's units with the authors' layer, in both forms."""
    options = VARIANTS[case.spec["model"]]
    network = ShuffleNetV2(**options)
    state = {key.replace("sfr.conv.weight", "sfr.weight"): value for key, value in case.state.items()}
    layers = learned_layers(network)
    known = {
        f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in ("mask", "stage")
    }
    network.load_state_dict({**known, "progress.train_step": torch.tensor(0), **state})
    network.double().eval()
    if count_params(network) != case.spec["params"]:
        raise ValueError(f"{count_params(network)} parameters")
    sizes = [
        [name, "SFR", layer.in_channels, layer.out_channels, layer.groups, layer.condensation_factor]
        for name, layer in layers.items()
    ]
    assert sizes == case.spec["layers"]
    for layer in layers.values():
        layer.condense_to(layer.condensation_factor - 1)
    small = ShuffleNetV2(**options, condensed=True).double().eval()
    small.load_state_dict(condense(network).state_dict())
    ours = _outputs(network, case.x)
    condensed = _outputs(small, case.x)
    for name, value in ours.items():
        assert (condensed[name] - value).abs().max() <= 1e-12 * value.abs().max(), name
    return {**ours, **{f"output/mask/{name}": layer.mask for name, layer in layers.items()}}
