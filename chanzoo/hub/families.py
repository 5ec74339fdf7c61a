"""What the cards say about a family of networks: its text, the published figures, and whom to cite."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """One section of the cards.

    Attributes:
        title: Heading.
        tag: On the Hub.
        archs: Our architectures.
        text: What it is, and how it differs from the paper.
        citation: BibTeX of the paper.
        baselines: Networks of timm that are trained beside ours, for comparison.
        published: Rows of (network, data, top-1 as printed, where).
        claim: Pairs of (baseline, method) whose difference is the claim under test.
    """

    title: str
    tag: str
    archs: tuple[str, ...]
    text: str
    citation: str
    baselines: tuple[str, ...] = ()
    published: tuple[tuple[str, str, str, str], ...] = ()
    claim: tuple[tuple[str, str], ...] = ()


FAMILIES = (
    Family(
        title="CIFAR residual networks",
        tag="cifar-resnet",
        archs=("cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56", "cifar_resnet110"),
        text="He et al., *Deep Residual Learning for Image Recognition* (CVPR 2016, arXiv:1512.03385), the "
        "networks for 32×32 images; parameter-free shortcuts (option A) unless `shortcut='B'`. They are "
        "the baselines of the other families.",
        citation="""\
@inproceedings{he2016deep,
  title     = {Deep Residual Learning for Image Recognition},
  author    = {He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2016}
}""",
    ),
    Family(
        title="Channel Equilibrium",
        tag="channel-equilibrium",
        archs=(
            *("ce_cifar_resnet20", "ce_cifar_resnet56", "ce_resnet18", "ce_resnet34", "ce_resnet50"),
            *("ce_resnet101", "ce_resnet152", "ce_mobilenetv2", "ce_mobilenetv2_050", "ce_mobilenetv2_075"),
            "ce_mobilenetv2_140",
        ),
        text="Shao et al., *Channel Equilibrium Networks for Learning Deep Representation* (ICML 2020, "
        "arXiv:2003.00214): batch decorrelation and instance re-weighting behind a norm. The ResNets follow "
        "the authors' placement. The placement in MobileNetV2 (behind every depthwise norm) and in the CIFAR "
        "networks (stem and all stages but the last) is ours, so the paper's accuracies do not carry over.",
        citation="""\
@inproceedings{shao2020channel,
  title     = {Channel Equilibrium Networks for Learning Deep Representation},
  author    = {Shao, Wenqi and Tang, Shitao and Pan, Xingang and Tan, Ping and Wang, Xiaogang and Luo, Ping},
  booktitle = {International Conference on Machine Learning},
  year      = {2020}
}""",
        baselines=("resnet50", "mobilenetv2_100"),
        published=(
            ("ResNet-50", "ImageNet-1k", "76.6", "authors' repository"),
            ("CE-ResNet-50", "ImageNet-1k", "78.2", "authors' repository, released file"),
        ),
        claim=(("cifar_resnet20", "ce_cifar_resnet20"), ("cifar_resnet56", "ce_cifar_resnet56")),
    ),
    Family(
        title="CIFAR networks that pruning papers use",
        tag="cifar-pruning",
        archs=("cifar_vgg16_bn", "cifar_densenet40", "cifar_googlenet"),
        text="VGG-16 with batch norm (Simonyan and Zisserman, arXiv:1409.1556), DenseNet-40 of growth 12 "
        "(Huang et al., arXiv:1608.06993) and GoogLeNet (Szegedy et al., arXiv:1409.4842), each as pruning "
        "papers cut it down for 32×32 images. They are the full networks that others are pruned from.",
        citation="""\
@inproceedings{simonyan2015very,
  title     = {Very Deep Convolutional Networks for Large-Scale Image Recognition},
  author    = {Simonyan, Karen and Zisserman, Andrew},
  booktitle = {International Conference on Learning Representations},
  year      = {2015}
}""",
    ),
    Family(
        title="HRank",
        tag="hrank",
        archs=(
            *(
                "hrank_cifar_vgg16_bn",
                "hrank_cifar_resnet56",
                "hrank_cifar_resnet110",
                "hrank_cifar_densenet40",
            ),
            *(
                "hrank_cifar_googlenet",
                "hrank_resnet50",
                "hrank_mobilenetv1",
                "hrank_mobilenetv2",
                "narrow_cnn",
            ),
        ),
        text="Lin et al., *HRank: Filter Pruning using High-Rank Feature Map* (CVPR 2020, "
        "arXiv:2002.10179): filters whose feature maps have a low mean rank are removed at once, then the "
        "network is fine-tuned. A tag says what was left (`m63`: 63 million multiply-adds), and the criterion"
        " where it is not the rank: `l1` (the filter's absolute weights) and `random` are there to compare "
        "with, fine-tuned alike; `s1` is the second seed. Unlike the authors we keep the channels of a "
        "residual stream together, rank the maps of images that are not augmented, and measure norms anew "
        "before fine-tuning, which takes 6 epochs here and 150 there.",
        citation="""\
@inproceedings{lin2020hrank,
  title     = {HRank: Filter Pruning using High-Rank Feature Map},
  author    = {Lin, Mingbao and Ji, Rongrong and Wang, Yan and Zhang, Yichen and Zhang, Baochang
               and Tian, Yonghong and Shao, Ling},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2020}
}""",
        published=(
            ("ResNet-56, full", "CIFAR-10", "93.26", "authors' repository"),
            ("ResNet-56, 65.94 M MACs", "CIFAR-10", "93.57", "authors' repository"),
            ("ResNet-56, 34.78 M MACs", "CIFAR-10", "92.32", "authors' repository"),
            ("VGG-16, full", "CIFAR-10", "93.96", "authors' repository"),
            ("VGG-16, 131.17 M MACs", "CIFAR-10", "93.73", "authors' repository"),
            ("VGG-16, 66.95 M MACs", "CIFAR-10", "93.10", "authors' repository"),
            ("ResNet-50, 2.26 G MACs", "ImageNet-1k", "75.56", "authors' repository"),
        ),
    ),
    Family(
        title="CondenseNet and CondenseNet V2",
        tag="condensenet",
        archs=(
            *("condensenetv2_a", "condensenetv2_b", "condensenetv2_c"),
            *("condensenetv2_cifar110", "condensenetv2_cifar146"),
            *("condensenet_cifar50", "condensenet_cifar62", "condensenet_cifar74", "condensenet_cifar86"),
        ),
        text="Yang et al., *CondenseNet V2: Sparse Feature Reactivation for Deep Networks* (CVPR 2021, "
        "arXiv:2104.04382), and Huang et al., *CondenseNet* (CVPR 2018, arXiv:1711.09224), the first version "
        "without reactivation. They drop connections in the first half of training; `condensed` in a tag "
        "says that masks have become small grouped convolutions, with the same outputs. No configuration was "
        "published for V2 on CIFAR: `condensenetv2_cifar110` and `146` are rebuilt from the published sizes. "
        "`condensenet_cifar62` is a depth of our own, which has about the multiply-adds of "
        "`condensenetv2_cifar110`, and fewer parameters. Our runs on CPUs are short (12 and 24 epochs; the "
        "authors train 300 and more).",
        citation="""\
@inproceedings{yang2021condensenet,
  title     = {CondenseNet V2: Sparse Feature Reactivation for Deep Networks},
  author    = {Yang, Le and Jiang, Haojun and Cai, Ruojin and Wang, Yulin and Song, Shiji and Huang, Gao
               and Tian, Qi},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year      = {2021}
}""",
        published=(
            ("CondenseNet V2-A", "ImageNet-1k", "64.4", "authors' repository"),
            ("CondenseNet V2-B", "ImageNet-1k", "71.9", "authors' repository"),
            ("CondenseNet V2-C", "ImageNet-1k", "75.9", "authors' repository"),
            ("CondenseNet V2-110", "CIFAR-10", "95.35", "authors' repository"),
            ("CondenseNet V2-146", "CIFAR-10", "95.65", "authors' repository"),
            ("CondenseNet-50", "CIFAR-10", "93.78", "authors' repository"),
            ("CondenseNet-74", "CIFAR-10", "94.72", "authors' repository"),
            ("CondenseNet-86", "CIFAR-10", "94.94", "authors' repository"),
        ),
        claim=(("condensenet_cifar62", "condensenetv2_cifar110"),),
    ),
    Family(
        title="ShuffleNetV2 with sparse feature reactivation",
        tag="sfr-shufflenetv2",
        archs=(
            *("sfr_shufflenetv2", "sfr_shufflenetv2_x0_5", "sfr_shufflenetv2_x1_5"),
            *("shufflenetv2_x0_5", "shufflenetv2_x1_0", "shufflenetv2_x1_5"),
        ),
        text="Ma et al., *ShuffleNet V2* (ECCV 2018, arXiv:1807.11164), and the same with the sparse feature "
        "reactivation of CondenseNet V2 (arXiv:2104.04382): in each unit that keeps the size of the maps, "
        "the half that was convolved updates the half that was not. The authors published no code of it: "
        "where the update goes follows their figure and remarks; groups, factor, and that updates start at "
        "zero, are ours.",
        citation="""\
@inproceedings{ma2018shufflenet,
  title     = {ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design},
  author    = {Ma, Ningning and Zhang, Xiangyu and Zheng, Hai-Tao and Sun, Jian},
  booktitle = {European Conference on Computer Vision},
  year      = {2018}
}""",
        claim=(("shufflenetv2_x0_5", "sfr_shufflenetv2_x0_5"), ("shufflenetv2_x1_0", "sfr_shufflenetv2")),
    ),
)


def family_of(arch: str) -> Family | None:
    """The family of an architecture of ours; None for timm's and unknown ones."""
    return next((family for family in FAMILIES if arch in family.archs), None)
