import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)
from transformers.modeling_outputs import ImageClassifierOutput

from hfkd.data import processor_for


class SmallConfig(PretrainedConfig):
    """What a net of hfkd.models carries."""

    model_type = "hfkd_test_small"

    def __init__(self, image_size=32, num_channels=3, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4), **kwargs):
        super().__init__(**kwargs)
        self.image_size, self.num_channels = image_size, num_channels
        self.image_mean, self.image_std = list(image_mean), list(image_std)


class Small(PreTrainedModel):
    config_class = SmallConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.net = nn.Linear(config.num_channels, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None, **kwargs):
        assert pixel_values.shape[1:] == (self.config.num_channels, self.config.image_size, self.config.image_size)
        return ImageClassifierOutput(logits=self.net(pixel_values.mean((2, 3))))


AutoConfig.register("hfkd_test_small", SmallConfig)
AutoModelForImageClassification.register(SmallConfig, Small)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_a_net_of_ours_works_in_a_pipeline_once_saved(tmp_path, picture):
    model = Small(SmallConfig(num_labels=4)).eval()
    processor = processor_for(model)
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    expected = (np.asarray(picture) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0), expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    scores = pipeline("image-classification", model=str(tmp_path))(picture.resize((50, 40)), top_k=4)
    assert sum(score["score"] for score in scores) == pytest.approx(1)
    with torch.no_grad():
        best = int(model(pixels).logits.argmax())
    assert pipeline("image-classification", model=str(tmp_path))(picture)[0]["label"] == f"LABEL_{best}"


def test_one_channel():
    processor = processor_for(Small(SmallConfig(image_size=16, num_channels=1, image_mean=[0.1], image_std=[0.5])))
    grey = Image.fromarray(np.full((8, 8), 51, dtype=np.uint8))
    pixels = processor(images=[grey], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, 16, 16)
    assert pixels.unique().tolist() == pytest.approx([(0.2 - 0.1) / 0.5])


def test_timm(picture):
    cfg = {**timm.get_pretrained_cfg("resnet10t").to_dict(), "input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5)}
    config = TimmWrapperConfig(architecture="resnet10t", pretrained_cfg=cfg, num_labels=3)
    processor = processor_for(TimmWrapperForImageClassification(config), "ignored")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(cfg))
    assert processor(images=picture)["pixel_values"].shape == (1, 3, 64, 64)
    torch.testing.assert_close(processor(images=picture)["pixel_values"][0], transform(picture))


def test_transformers(tmp_path):
    model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert processor_for(model, tmp_path).crop_size["height"] == 32
    model.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path)
    assert type(processor_for(loaded)) is type(AutoImageProcessor.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="was not loaded from anywhere: pass name_or_path"):
        processor_for(model)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="no image processor beside .*save one there"):
        processor_for(model, tmp_path / "model")


def test_our_own_nets(picture):
    models = pytest.importorskip("hfkd.models")
    model = models.load_model("resnet8", num_labels=10)
    processor = processor_for(model)
    assert isinstance(processor, ViTImageProcessor)
    assert list(processor.image_mean) == model.config.image_mean
    assert list(processor.image_std) == model.config.image_std
    assert model(**processor(images=picture, return_tensors="pt")).logits.shape == (1, model.config.num_labels)
