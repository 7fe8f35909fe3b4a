"""Write your own method: a class with one method. Here each sample counts as much as the teacher is sure of it.

    python examples/custom_distiller.py --teacher outputs/demo/teacher --labels 100 --max_steps 150

All flags are those of run_image_kd.py, whose code runs here with the class below (`make demo` trains that teacher).
"""

import run_image_kd

from hfkd import Distiller
from hfkd.cli import explain_refusals, parse_arguments
from hfkd.functional import kd_loss


class ConfidentKD(Distiller):
    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student, teacher, batch):
        sure = teacher.logits.softmax(-1).amax(-1)
        kd = kd_loss(student.logits, teacher.logits, temperature=self.temperature, reduction="none")
        return {"task": self.task_loss(student, batch), "confident_kd": sure * kd}


if __name__ == "__main__":
    types = (run_image_kd.ModelArguments, run_image_kd.DataArguments, run_image_kd.TrainingArguments)
    with explain_refusals():
        run_image_kd.run(*parse_arguments(types), distiller=ConfidentKD())
