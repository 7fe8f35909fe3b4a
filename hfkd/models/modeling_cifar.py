"""The convolutional networks of the CIFAR distillation literature as one transformers model.

Self-contained on purpose: `save_pretrained` puts a copy of this file beside the weights, so that
`from_pretrained(..., trust_remote_code=True)` works on a machine without hfkd.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


MODEL_NAMES = (
    "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4",
    "resnet18", "resnet50", "wrn_16_1", "wrn_16_2", "wrn_28_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg13",
    "mobilenetv2", "shufflenetv1", "shufflenetv2",
)  # fmt: skip
"""The names used in papers; any ``resnet{6n+2}``, ``resnet{6n+2}x4`` and ``wrn_{6n+4}_{k}`` works too."""


class CifarConfig(PreTrainedConfig):
    """Configuration of a :class:`CifarForImageClassification`.

    Args:
        architecture: One of :data:`MODEL_NAMES`, or another depth of the ResNet and WRN families.
        shortcut: Where a ResNet changes its shape: ``"B"``, a 1x1 convolution with BatchNorm (the CRD networks), or
            ``"A"``, subsampling and zero channels (He et al. 2016 on CIFAR). Other families ignore it.
        image_size: Side of the square images that the network is meant for; it pools globally, so others work too.
        num_channels: Channels of the images.
        image_mean: Mean that the inputs are normalised with; CIFAR-100's in the CRD recipe.
        image_std: Standard deviation that they are normalised with; likewise.
        **kwargs: What every configuration takes, such as ``num_labels`` and ``id2label``.
    """

    model_type = "hfkd_cifar"

    def __init__(
        self,
        architecture: str = "resnet20",
        shortcut: str = "B",
        image_size: int = 32,
        num_channels: int = 3,
        image_mean: tuple[float, ...] = (0.5071, 0.4867, 0.4408),
        image_std: tuple[float, ...] = (0.2675, 0.2565, 0.2761),
        **kwargs,
    ):
        self.architecture = architecture
        self.shortcut = shortcut
        self.image_size = image_size
        self.num_channels = num_channels
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        super().__init__(**kwargs)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False):
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=bias)


# No ReLU and no addition below is in place: a feature captured by a hook must stay what its layer returned.


class _ZeroPadShortcut(nn.Module):
    """Shortcut A: every second pixel, and zeros for the new channels, half of them on each side."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


def _shortcut(in_channels: int, out_channels: int, stride: int, kind: str) -> nn.Module:
    if kind not in ("A", "B"):
        raise ValueError(f"unknown shortcut {kind!r}: use 'A' (zero channels) or 'B' (1x1 convolution)")
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if kind == "A":
        return _ZeroPadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride, shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.shortcut(x))


class _BottleneckBlock(nn.Module):
    """A 3x3 convolution on a quarter of the channels, between two 1x1 ones (He et al. 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = _conv(in_channels, channels // 4, 1)
        self.bn1 = nn.BatchNorm2d(channels // 4)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(channels // 4, channels // 4, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels // 4)
        self.relu2 = nn.ReLU()
        self.conv3 = _conv(channels // 4, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride, shortcut)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(residual)))))
        return self.relu3(residual + self.shortcut(x))


class _WideBlock(nn.Module):
    """A basic block with the normalisation first (Zagoruyko & Komodakis 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv(channels, channels, 3)
        self.shortcut = None if in_channels == channels else _conv(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        residual = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class _VGGBlock(nn.Module):
    """A 3x3 convolution with bias, after max-pooling if the stride is 2."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.pool = nn.MaxPool2d(2) if stride == 2 else nn.Identity()
        self.conv = _conv(in_channels, channels, 3, bias=True)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(self.pool(x))))


class _InvertedResidual(nn.Module):
    """Expand, filter each channel, project (Sandler et al. 2018), with ReLU for ReLU6 as in the CRD networks."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.conv1 = _conv(in_channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = _conv(hidden, channels, 1)
        self.bn3 = nn.BatchNorm2d(channels)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        residual = self.relu1(self.bn1(self.conv1(x)))
        residual = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(residual)))))
        return x + residual if self.has_shortcut else residual


class _ShuffleV1Block(nn.Module):
    """Grouped 1x1 convolutions around a channel shuffle and a depthwise one (Zhang et al. 2018), 3 groups.

    At stride 2 the pooled input is concatenated, not added. The first 1x1 convolution after the stem is not grouped.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        branch = channels - in_channels if stride == 2 else channels
        hidden = branch // 4
        groups = 1 if in_channels == 24 else 3
        self.conv1 = _conv(in_channels, hidden, 1, groups=groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2 = _conv(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = _conv(hidden, branch, 1, groups=3)
        self.bn3 = nn.BatchNorm2d(branch)
        self.shortcut = nn.AvgPool2d(3, 2, padding=1) if stride == 2 else nn.Identity()
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        residual = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(residual)))))
        shortcut = self.shortcut(x)
        return self.relu3(torch.cat([residual, shortcut], 1) if self.stride == 2 else residual + shortcut)


class _ShuffleV2Block(nn.Module):
    """Half of the channels pass, the others are filtered, then both are shuffled (Ma et al. 2018)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.stride = stride
        half = channels // 2
        self.left = nn.Identity()
        if stride == 2:
            self.left = nn.Sequential(
                _conv(in_channels, in_channels, 3, 2, groups=in_channels),
                nn.BatchNorm2d(in_channels),
                _conv(in_channels, half, 1),
                nn.BatchNorm2d(half),
                nn.ReLU(),
            )
        self.right = nn.Sequential(
            _conv(in_channels if stride == 2 else half, half, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            _conv(half, half, 3, stride, groups=half),
            nn.BatchNorm2d(half),
            _conv(half, half, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
        )
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride == 2 else x.chunk(2, dim=1)
        return self.shuffle(torch.cat([self.left(left), self.right(right)], dim=1))


Layers = dict[str, nn.Module]


def _stem(config: CifarConfig, channels: int, kernel: int = 3, stride: int = 1) -> Layers:
    conv = _conv(config.num_channels, channels, kernel, stride)
    return {"conv1": conv, "bn1": nn.BatchNorm2d(channels), "relu": nn.ReLU()}


def _stages(channels: int, *rows: tuple[Callable[..., nn.Module], int, int, int]) -> Layers:
    """Stages ``layer1``, ``layer2``, ...; a row is (block, channels, number of blocks, stride of the first one)."""
    layers = {}
    for number, (block, width, depth, stride) in enumerate(rows, start=1):
        first = block(channels, width, stride)
        layers[f"layer{number}"] = nn.Sequential(first, *(block(width, width, 1) for _ in range(depth - 1)))
        channels = width
    return layers


def _head(config: CifarConfig, channels: int) -> Layers:
    linear = nn.Linear(channels, config.num_labels)
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": linear}


def _resnet(config: CifarConfig, block: type[nn.Module], stem: int, stages: list[tuple[int, int]]) -> Layers:
    block = partial(block, shortcut=config.shortcut)
    rows = [(block, width, depth, 1 if i == 0 else 2) for i, (width, depth) in enumerate(stages)]
    return _stem(config, stem) | _stages(stem, *rows) | _head(config, stages[-1][0])


def _wide_resnet(config: CifarConfig, depth: int, widen: int) -> Layers:
    n, width = (depth - 4) // 6, 64 * widen
    return {
        "conv1": _conv(config.num_channels, 16, 3),
        **_stages(16, *((_WideBlock, 16 * widen * stride, n, min(stride, 2)) for stride in (1, 2, 4))),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
        **_head(config, width),
    }


def _vgg(config: CifarConfig, depth: int) -> Layers:
    n = (depth - 3) // 5
    # The last two stages share one resolution, 4x4 for CIFAR.
    stages = [(64, 1), (128, 2), (256, 2), (512, 2), (512, 1)]
    rows = [(_VGGBlock, width, n, stride) for width, stride in stages]
    return _stages(config.num_channels, *rows) | _head(config, 512)


def _mobilenet_v2(config: CifarConfig) -> Layers:
    rows = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]
    return {
        **_stem(config, 16, stride=2),
        **_stages(16, *((partial(_InvertedResidual, expansion=expansion), *row) for expansion, *row in rows)),
        "conv2": _conv(160, 1280, 1),
        "bn2": nn.BatchNorm2d(1280),
        "relu2": nn.ReLU(),
        **_head(config, 1280),
    }


def _shufflenet_v1(config: CifarConfig) -> Layers:
    rows = [(_ShuffleV1Block, 240, 4, 2), (_ShuffleV1Block, 480, 8, 2), (_ShuffleV1Block, 960, 4, 2)]
    return _stem(config, 24, kernel=1) | _stages(24, *rows) | _head(config, 960)


def _shufflenet_v2(config: CifarConfig) -> Layers:
    rows = [(_ShuffleV2Block, 116, 4, 2), (_ShuffleV2Block, 232, 8, 2), (_ShuffleV2Block, 464, 4, 2)]
    return {
        **_stem(config, 24, kernel=1),
        **_stages(24, *rows),
        "conv2": _conv(464, 1024, 1),
        "bn2": nn.BatchNorm2d(1024),
        "relu2": nn.ReLU(),
        **_head(config, 1024),
    }


def find_architecture(name: str) -> Callable[[CifarConfig], Layers] | None:
    """What builds the layers of the named architecture, or None if the name is not of this family."""
    sizes = [int(digits) for digits in re.findall(r"\d+", name)]
    match re.sub(r"\d+", "#", name), *sizes:
        case "resnet#", 18:
            return partial(_resnet, block=_BasicBlock, stem=64, stages=[(64, 2), (128, 2), (256, 2), (512, 2)])
        case "resnet#", 50:
            return partial(_resnet, block=_BottleneckBlock, stem=64, stages=[(256, 3), (512, 4), (1024, 6), (2048, 3)])
        case "resnet#", depth if depth > 2 and depth % 6 == 2:
            return partial(_resnet, block=_BasicBlock, stem=16, stages=[(width, depth // 6) for width in (16, 32, 64)])
        case "resnet#x#", depth, 4 if depth > 2 and depth % 6 == 2:
            return partial(_resnet, block=_BasicBlock, stem=32, stages=[(w, depth // 6) for w in (64, 128, 256)])
        case "wrn_#_#", depth, widen if depth > 4 and depth % 6 == 4 and widen > 0:
            return partial(_wide_resnet, depth=depth, widen=widen)
        case "vgg#", 8 | 13 as depth:
            return partial(_vgg, depth=depth)
        case "mobilenetv#", 2:
            return _mobilenet_v2
        case "shufflenetv#", 1:
            return _shufflenet_v1
        case "shufflenetv#", 2:
            return _shufflenet_v2
    return None


class CifarForImageClassification(PreTrainedModel):
    """A CIFAR network that ends in one linear layer, ``model.linear``.

    The top level is a plain sequence: ``conv1``, ``bn1``, ``relu`` (WRN has ``bn1`` and ``relu`` after the stages, VGG
    none), the stages ``layer1``, ``layer2``, ..., for the two light families ``conv2``, ``bn2``, ``relu2``, and then
    ``pool``, ``flatten``, ``linear``. State-dict keys of the ResNets are those of akamaster's repository.

    Convolutions start from He et al.'s normal distribution (fan-out), the linear layer from PyTorch's default.

    Args:
        config: The architecture and its classes.

    Raises:
        ValueError: If the architecture is unknown.

    Source: CRD's networks, github.com/HobbitLong/RepDistiller; option A, github.com/akamaster/pytorch_resnet_cifar10.

    >>> config = CifarConfig(architecture="resnet8", num_labels=10)
    >>> CifarForImageClassification(config)(torch.zeros(2, 3, 32, 32)).logits.shape
    torch.Size([2, 10])
    """

    config_class = CifarConfig
    base_model_prefix = "cifar"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: CifarConfig):
        super().__init__(config)
        build = find_architecture(config.architecture)
        if build is None:
            raise ValueError(
                f"unknown architecture {config.architecture!r}: use one of {', '.join(MODEL_NAMES)}, "
                "or another depth as resnet{6n+2}, resnet{6n+2}x4, wrn_{6n+4}_{width}"
            )
        layers = build(config)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.layer_names = tuple(layers)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # transformers guards torch's initialisers while this runs: weights that were loaded stay.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor, ...]:
        """Classify normalised images.

        Args:
            pixel_values: Images, normalised with the configuration's mean and standard deviation.
            labels: Class indices for the loss; -100 is ignored. Targets if ``num_labels`` is 1.
            output_hidden_states: Return the output of every stage.
            return_dict: Return an output object, the default, or a tuple.

        Shapes:
            ``pixel_values``: (B, C, H, W); ``labels``: (B,); ``logits``: (B, num_labels).

        Returns:
            The loss if labels are given, the logits, and the hidden states if asked for.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict

        hidden = pixel_values
        stages = []
        for name in self.layer_names:
            hidden = getattr(self, name)(hidden)
            if name.startswith("layer"):
                stages.append(hidden)

        output = ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else self.loss_function(labels, hidden, self.config),
            logits=hidden,
            hidden_states=tuple(stages) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()
