"""What hfkd is measured against, each as its users write it: the loop of the literature, torchdistill, TextBrewer."""

import logging
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms


ALPHA, TEMPERATURE = 0.9, 4.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pictures(Dataset):
    """Images as torchvision's CIFAR-10 gives them: a PIL image a sample, augmented one by one."""

    def __init__(self, pixels: np.ndarray, labels: Sequence[int]):
        self.pixels, self.labels = pixels, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(PIL.Image.fromarray(self.pixels[row])), self.labels[row]


def reference_loop(
    teacher: nn.Module, student: nn.Module, pictures: Pictures, batch_size: int, workers: int = 2
) -> Callable[[], None]:
    """An epoch of the literature's loop: plain PyTorch, float32, the teacher asked at every step."""
    device = next(student.parameters()).device
    loader = DataLoader(pictures, batch_size, shuffle=True, num_workers=workers)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    teacher.eval()

    def epoch():
        student.train()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.no_grad():
                answer = teacher(images).logits
            logits = student(images).logits
            soft = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, -1), F.softmax(answer / TEMPERATURE, -1), reduction="batchmean"
            )
            loss = (1 - ALPHA) * F.cross_entropy(logits, labels) + ALPHA * TEMPERATURE**2 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def torchdistill_box(pictures: Pictures, batch_size: int, workers: int = 2) -> Callable[[], None]:
    """An epoch of torchdistill's DistillationBox with its own ResNet-56 and ResNet-20 and its KDLoss.

    Configured as its ``configs/sample/cifar10/kd`` are; the loop is that of its ``examples/torchvision``.
    """
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.misc.log import MetricLogger, SmoothedValue
    from torchdistill.models.classification.resnet import resnet20, resnet56

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = {
        "student_module_path": ".",
        "student_module_io": "output",
        "teacher_module_path": ".",
        "teacher_module_io": "output",
        "temperature": TEMPERATURE,
        "alpha": 1 - ALPHA,
        "reduction": "batchmean",
    }
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": batch_size, "num_workers": workers},
        },
        "teacher": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    models = [model.to(device) for model in (resnet56(num_classes=10).eval(), resnet20(num_classes=10))]
    box = get_distillation_box(*models, {"train": pictures}, config, device, None, False, 1)

    def epoch():
        box.pre_epoch_process(epoch=0)
        log = MetricLogger(delimiter="  ")
        log.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
        for images, labels, supplement in log.log_every(box.train_data_loader, 1000, ""):
            images, labels = images.to(device), labels.to(device)
            loss = box.forward_process(images, labels, supplement)
            box.post_forward_process(loss)
            log.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        box.post_epoch_process()

    return epoch


def textbrewer_distiller(teacher: nn.Module, student: nn.Module, loader: DataLoader) -> Callable[[], None]:
    """An epoch of TextBrewer's GeneralDistiller on logits and labels; it saves and logs nothing here."""
    import textbrewer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = tempfile.mkdtemp()
    train_config = textbrewer.TrainingConfig(device=device, output_dir=folder)
    distill_config = textbrewer.DistillationConfig(
        temperature=TEMPERATURE, kd_loss_weight=ALPHA, hard_label_weight=1 - ALPHA, kd_loss_type="ce"
    )

    def adaptor(batch, outputs):
        return {"logits": (outputs.logits,), "losses": (outputs.loss,)}

    distiller = textbrewer.GeneralDistiller(
        train_config, distill_config, teacher.to(device), student.to(device), adaptor, adaptor
    )
    distiller.save_and_callback = lambda *_: None  # a checkpoint is no part of an epoch
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, fused=True)  # as ours has
    logging.getLogger("Distillation").setLevel(logging.WARNING)

    def epoch():
        with distiller:
            distiller.train(optimizer, loader, num_epochs=1)

    return epoch
