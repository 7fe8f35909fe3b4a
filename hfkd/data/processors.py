"""The image processor, or the tokenizer, that fits a model."""

import textwrap
from pathlib import Path

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTImageProcessor,
)
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hfkd.hub import remedy_for
from hfkd.models.loading import HUB_PREFIX


def processor_for(model: PreTrainedModel, name_or_path: str | Path | None = None) -> BaseImageProcessor:
    """The image processor with which a model was, or is to be, trained.

    A model of ``hfkd.models`` carries its preprocessing in its config; it gets a ``ViTImageProcessor``, so that
    ``pipeline("image-classification")`` works on the saved student. With ``num_channels=1`` the processor has one
    mean and one deviation and takes images of one channel.

    Args:
        model: One of ``hfkd.models``, a timm model as ``TimmWrapperForImageClassification``, or any transformers
            image classifier.
        name_or_path: Where a transformers model's processor lies; by default where the model itself came from.

    Raises:
        ValueError: If a transformers model has no processor of its own.

    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> processor_for(ViTForImageClassification(ViTConfig(num_hidden_layers=0)))
    Traceback (most recent call last):
    ...
    ValueError: ViTForImageClassification was not loaded from anywhere: pass name_or_path of the model whose ...
    """
    config = model.config
    if isinstance(config, TimmWrapperConfig):
        return TimmWrapperImageProcessor(config.pretrained_cfg, architecture=config.architecture)
    settings = config.to_dict()
    if "image_mean" in settings:
        return ViTImageProcessor(
            size={"height": config.image_size, "width": config.image_size},
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
        )
    source = str(name_or_path or config.name_or_path).removeprefix(HUB_PREFIX)
    if not source:
        raise ValueError(
            f"{type(model).__name__} was not loaded from anywhere: pass name_or_path of the model whose preprocessing "
            "it shares (the teacher's, as a rule), or make a ViTImageProcessor(size=…, image_mean=…, image_std=…)"
        )
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        reason = remedy_for(error) or (error if isinstance(error, OSError) else None)
        if reason is None:
            raise
        raise ValueError(
            f"no image processor beside {source} ({reason}): save one there with processor.save_pretrained, or pass "
            "name_or_path of the model whose preprocessing it shares"
        ) from error


def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name_or_path: Hub id or local folder.
        trust_remote_code: Run the code that lies beside it.

    Raises:
        ValueError: If there is none, or one without words, which transformers makes where it finds no files.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:
        remedy = remedy_for(error)
        if remedy is None and not isinstance(error, (OSError, ValueError)):
            raise
        reason = remedy or textwrap.shorten(str(error), 240, placeholder=" …")
        raise ValueError(
            f"no tokenizer in {str(name_or_path)!r} ({reason}): name a Hub id or a folder of a text model, with its "
            "tokenizer beside it (tokenizer.save_pretrained)"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"the tokenizer in {str(name_or_path)!r} knows no word, so its files are not there: save it beside the "
            "model with tokenizer.save_pretrained"
        )
    return tokenizer
