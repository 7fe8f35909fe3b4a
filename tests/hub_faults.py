"""Pull and push while the Hub, here in the same process, has its faults; ``test_hub.py`` reads what is said of each.

The folder that is named is worked in. The last line of standard output is JSON: by scenario what was raised, or what
came of it. Between two tries clients wait for seconds; here those waits are left out and counted.
"""

import json
import os
import sys
import threading
import types
import warnings
from pathlib import Path

from local_hub import LocalHub, add_datasets


TOKEN, READER = "hf_mine", "hf_reader"
HUB = LocalHub()


def main(folder: Path, data: Path) -> None:
    os.environ.update(HUB.environment(folder / "hf", TOKEN))
    os.environ |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HFKD_CACHE": str(folder / "caches")}
    os.environ.pop("HF_HUB_OFFLINE", None)
    # What is read at import is set: now they can come.
    import huggingface_hub
    import huggingface_hub.file_download
    import huggingface_hub.utils._http
    import torch
    from helpers import make_trainer, rows, tiny, tiny_teacher
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback, ViTImageProcessor

    from hfkd.data import load_image_data, load_tokenizer
    from hfkd.distillers import KD
    from hfkd.models import load_model, load_teacher

    waits = []
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        module.time = types.SimpleNamespace(**{**vars(module.time), "sleep": waits.append})
    HUB.add_user("me", TOKEN)
    HUB.add_user("me", READER, may_write=False)
    add_datasets(HUB, data)
    tiny_teacher("vit").save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    for name, options in {"public": {}, "private": {"private": True}, "gated": {"gated": True}}.items():
        HUB.add_repo("model", f"other/{name}", folder / "vit", **options)
        HUB.add_repo("dataset", f"other/{name}-data", HUB.repos["dataset", "uoft-cs/cifar10"].files, **options)
    HUB.add_repo("model", "other/empty", {"README.md": b"nothing"})
    places = iter(range(100))
    found = {}

    def said(name, call, *given, token=TOKEN, fault=None, **kind):
        """What a call raises; the caches are new, so that nothing comes from them."""
        home = folder / f"cache{next(places)}"
        for module in [m for name, m in sys.modules.items() if name.startswith(("huggingface_hub", "transformers"))]:
            for constant in ("HF_HUB_CACHE", "default_cache_path"):
                if isinstance(vars(module).get(constant), str):
                    setattr(module, constant, str(home / "hub"))
        import datasets.config

        datasets.config.HF_DATASETS_CACHE = home / "datasets"
        os.environ.pop("HF_TOKEN", None)
        if token is not None:
            os.environ["HF_TOKEN"] = token
        if fault is not None:
            fault = HUB.fail(fault, **{"times": 99, **kind})
        waits.clear()
        try:
            result = str(call(*given))
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        if fault is not None:
            fault.times = 0
        found[name] = result
        return result

    def weights_of(name):
        model, here = load_model(name), load_model(folder / "vit")
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), here.parameters(), strict=True))
        return "the weights are those that are there" if same else "other weights"

    # Pulling

    def teacher(name="other/public"):
        return type(load_teacher(name, task="image-classification")).__name__

    def images(name="other/public-data"):
        return len(load_image_data(name).train)

    for kind, pull, where in (
        ("model", teacher, "HEAD /other/public/"),
        ("data", images, "HEAD /datasets/other/public"),
    ):
        end = "" if kind == "model" else "-data"
        said(f"{kind}: wrong id", pull, "me/nothing")
        said(f"{kind}: wrong id, not logged in", pull, "me/nothing", token=None)
        said(f"{kind}: private", pull, f"other/private{end}")
        said(f"{kind}: gated", pull, f"other/gated{end}")
        said(f"{kind}: wrong token", pull, token="hf_wrong")
        for status in (403, 429, 503):
            said(f"{kind}: {status}", pull, fault=where, status=status)
        said(f"{kind}: too slow", pull, fault=where, delay=1.5)
        said(f"{kind}: breaks off", pull, fault="GET /cdn", cut_after=0)
    said("model: no such revision", lambda: load_model("other/public", revision="v9"))
    said("model: no model", teacher, "other/empty")
    said("tokenizer: 429", load_tokenizer, "other/public", fault="/other/public/", status=429)
    said("model: breaks off once", weights_of, "other/public", fault="GET /cdn", cut_after=5000, times=1)
    said("data: breaks off once", images, "svhn", fault="GET /cdn", cut_after=9, times=1)

    # Pushing

    def trainer(name, hub_token=TOKEN, seed=1, **arguments):
        arguments = {"push_to_hub": True, "hub_model_id": name, "hub_token": hub_token, **arguments}
        place = folder / f"run{next(places)}"
        return make_trainer(place, tiny("bert", seed=seed), tiny_teacher("bert"), KD(), rows("bert"), **arguments)

    def saved(run):
        """Whether the student lies in the output folder as it is in memory."""
        here = load_model(run.args.output_dir, task="text-classification").state_dict()
        return all(torch.equal(tensor, here[name]) for name, tensor in run.model.state_dict().items())

    said("push: wrong token", trainer, "me/a", "hf_wrong")
    said("push: reader's token", trainer, "me/a", READER)
    said("push: name of others", trainer, "other/a")
    said("push: 503 at the start", trainer, "me/a", fault="repos/create", status=503)
    assert ("model", "me/a") not in HUB.repos

    for seed, (name, where) in enumerate({"upload": "PUT /upload", "commit": "/me/push/commit"}.items()):
        run = trainer("me/push", seed=seed)
        run.train()
        said(f"push: 503 at {name}", run.push_to_hub, "Again", fault=where, status=503)
        found[f"saved at {name}"] = saved(run)
        said(f"push: 503 once at {name}", run.push_to_hub, fault=where, status=503, times=1)
        found[f"waits at {name}"] = len(waits)
    said("push: 429", run.push_to_hub, "Again", fault="/me/push/commit", status=429)
    said("push: breaks off", run.push_to_hub, "Again", fault="/me/push/preupload", cut_after=0)
    said("push: after all", run.push_to_hub)
    run.model.classifier.bias.data.add_(1)
    said("push: in the background", lambda: run.push_to_hub("Later", blocking=False).result())
    found["pushed after all"] = (
        HUB.repos["model", "me/push"].files["model.safetensors"]
        == Path(run.args.output_dir, "model.safetensors").read_bytes()
    )

    adapter = get_peft_model(tiny("bert"), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    make_trainer(folder / "adapter", adapter, None, None, rows("bert"), hub_model_id="me/adapter").push_to_hub()
    found["files of an adapter"] = sorted(HUB.pushed("me/adapter"))

    # While training goes on

    class Release(TrainerCallback):
        all_saved = threading.Event()

        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.all_saved.set()

    run = trainer("me/steps", save_strategy="steps", save_steps=1, hub_always_push=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said("steps: 503", lambda: run.train().global_step, fault="/me/steps/commit", status=503, times=2)
    found["warned"] = [str(w.message) for w in caught if "push" in str(w.message)]
    found["titles"] = [commit.title for commit in HUB.repos["model", "me/steps"].commits[1:]]
    found["checkpoints"] = sorted(path.name for path in Path(run.args.output_dir).glob("checkpoint-*"))
    run = trainer("me/busy", save_strategy="steps", save_steps=1)
    run.add_callback(Release())
    said("steps: slow", lambda: run.train().global_step, fault="/me/busy/commit", until=Release.all_saved, times=1)
    found["titles of busy"] = [commit.title for commit in HUB.repos["model", "me/busy"].commits[1:]]
    HUB.__exit__()
    huggingface_hub.close_session()
    said("hub gone", teacher)
    print(json.dumps(found))


if __name__ == "__main__":
    with HUB:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
