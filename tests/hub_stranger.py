"""Pull students from the Hub as somebody does who has no hfkd, and answer with each: started by ``test_hub.py``.

The file that is named holds JSON, ``{"image": path, "sentences": […], "students": {id: {"task", "code", "timm"}}}``.
The answers are the last line of standard output.
"""

import json
import sys
from pathlib import Path


sys.modules["hfkd"] = None  # importing it raises ImportError, wherever it is installed

import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)


def answers(name: str, asked: dict, image: Image.Image, sentences: list[str]) -> dict:
    code = {"trust_remote_code": asked["code"]}
    if asked["task"] == "image-classification":
        model = AutoModelForImageClassification.from_pretrained(name, **code)
        inputs = AutoImageProcessor.from_pretrained(name, **code)(image, return_tensors="pt")
        classify, content = pipeline(asked["task"], model=name, **code), image
    else:
        model = AutoModelForSequenceClassification.from_pretrained(name, **code)
        inputs = AutoTokenizer.from_pretrained(name, **code)(*sentences, return_tensors="pt")
        classify, content = (
            pipeline(asked["task"], model=name, **code),
            {"text": sentences[0], "text_pair": sentences[1]},
        )
    with torch.no_grad():
        found = {"logits": model.eval()(**inputs).logits[0].tolist()}
        if asked["timm"]:
            network = timm.create_model(f"hf-hub:{name}", pretrained=True).eval()
            found["timm"] = network(inputs["pixel_values"])[0].tolist()
    found["pipeline"] = {entry["label"]: entry["score"] for entry in classify(content, top_k=model.config.num_labels)}
    return found


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    image = Image.open(asked["image"])
    try:
        import hfkd  # noqa: F401
    except ImportError:
        found = {k: answers(k, v, image, asked["sentences"]) for k, v in asked["students"].items()}
        assert not [name for name in sys.modules if name.startswith("hfkd.")]
        print(json.dumps(found))
