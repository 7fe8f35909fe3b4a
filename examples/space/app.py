"""A teacher and its student side by side, on an image or a text: answers, probabilities, latency, agreement.

    TEACHER=me/teacher STUDENT=me/student python app.py
    python app.py --teacher outputs/demo/teacher --student outputs/demo/taught-100-0 --trust_remote_code

Each flag can be a variable of the environment (or of the Space) instead: TEACHER, STUDENT, PAIR=1 for tasks on pairs
of texts, TRUST_REMOTE_CODE=1 for models that come with code of their own, as hfkd's CIFAR networks do. Models are Hub
ids or local folders; whether they read images or texts is in their configuration. Needs no hfkd.
"""

import argparse
import inspect
import os
import statistics
import time
import warnings
from html import escape
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)


ROUNDS = 5
SHOWN_CLASSES = 5
MOST_PIXELS = 50_000_000
MOST_CHARACTERS = 10_000
LARGEST_UPLOAD = "20mb"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AUTO_MODELS = {"image": AutoModelForImageClassification, "text": AutoModelForSequenceClassification}
CSS = """
#comparison, #comparison > * {padding: 0}
#comparison table {width: 100%; border: 0; border-collapse: collapse; margin: 0 0 1.25rem;
  font-variant-numeric: tabular-nums}
#comparison th, #comparison td {padding: .4rem .5rem; text-align: left; vertical-align: top; overflow-wrap: anywhere;
  border: 0; border-bottom: 1px solid var(--border-color-primary)}
#comparison tr {border: 0}
#comparison th {overflow-wrap: break-word}
#comparison tbody th {font-weight: 400; width: 30%}
#comparison td {width: 35%}
#comparison .verdict {font-size: 1.25rem; font-weight: 600; margin: 0 0 .25rem}
#comparison .note {margin: 0 0 1.25rem}
#comparison .answer {font-weight: 600}
#comparison .bar {display: block; height: .6rem; margin-top: .25rem; min-width: 1px; border: 1px solid #0072b2}
#comparison .teacher {background: #0072b2}
#comparison .student {border-color: #b34e00;
  background: repeating-linear-gradient(135deg, #b34e00 0 2px, transparent 2px 6px)}
#comparison .refused {border-left: .3rem solid #b34e00; padding: .5rem .75rem; font-weight: 600}
"""


class Unusable(ValueError):
    """What was typed or uploaded cannot be answered; the message says what to do about it."""


class Classifier:
    """A model with what turns an image, or texts, into its inputs."""

    def __init__(self, role: str, name: str, trust_remote_code: bool):
        self.role, self.name = role, name
        options = {"trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(name, **options)
            self.kind = kind_of(config)
            model = AUTO_MODELS[self.kind].from_pretrained(name, use_safetensors=True, dtype=torch.float32, **options)
            reader = AutoImageProcessor if self.kind == "image" else AutoTokenizer
            self.reader = reader.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            remedy = "name a Hub id, or a folder that save_pretrained wrote, with its processor or tokenizer"
            if "trust_remote_code" in str(error):
                line = "it comes with code of its own, which is not run"
                remedy = "set TRUST_REMOTE_CODE=1 if you trust it"
            raise SystemExit(f"cannot load the {role} {name!r} ({line}): {remedy}") from error
        self.model = model.eval().to(DEVICE)
        self.names = [str(config.id2label[i]) for i in range(config.num_labels)]
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.settings = config.to_dict()

    def inputs(self, content: Image.Image | list[str]) -> dict[str, torch.Tensor]:
        if self.kind == "image":
            grey = self.settings.get("num_channels") == 1
            inputs = self.reader(images=content.convert("L" if grey else "RGB"), return_tensors="pt")
        else:
            longest = min(self.reader.model_max_length, self.settings.get("max_position_embeddings") or 512)
            inputs = self.reader(*content, truncation=True, max_length=longest, return_tensors="pt")
        accepted = inspect.signature(self.model.forward).parameters
        return {name: tensor.to(DEVICE) for name, tensor in inputs.items() if name in accepted}

    @torch.inference_mode()
    def scores(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Probabilities of the classes, or the predicted number; on the CPU, so that the time is the whole time."""
        logits = self.model(**inputs).logits[0].float()
        return (logits if len(self.names) == 1 else logits.softmax(-1)).cpu()


def kind_of(config) -> str:
    names = config.architectures or []
    if config.model_type == "timm_wrapper" or any(name.endswith("ForImageClassification") for name in names):
        return "image"
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "text"
    raise ValueError(f"its architectures are {names}, and neither an image nor a text classifier is among them")


def classes_in_order(teacher: Classifier, student: Classifier) -> list[int]:
    """For each class of the teacher its index in the student."""
    if teacher.kind != student.kind:
        raise SystemExit(
            f"the teacher reads {teacher.kind}s and the student {student.kind}s: name two models of the same task"
        )
    if teacher.names == student.names:
        return list(range(len(teacher.names)))
    if sorted(teacher.names) != sorted(student.names):
        raise SystemExit(
            f"teacher and student do not have the same classes ({', '.join(teacher.names[:5])}… and "
            f"{', '.join(student.names[:5])}…): name two models of the same task, with the same id2label"
        )
    return [student.names.index(name) for name in teacher.names]


def read_image(path: str | None) -> Image.Image:
    if not path:
        raise Unusable("No image yet: choose one above.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = Image.open(path)
        if image.width * image.height > MOST_PIXELS:
            raise Unusable(
                f"This image has {image.width} × {image.height} pixels, and at most {MOST_PIXELS // 10**6} million "
                "are read: scale it down first."
            )
        return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:
        raise Unusable("This image has far too many pixels: scale it down first.") from None
    except UnidentifiedImageError:
        raise Unusable("This file is not an image that can be read: choose a PNG, JPEG, WebP or GIF file.") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable("This image is damaged or cut off: save it again, or choose another one.") from None


def read_texts(*texts: str) -> list[str]:
    for number, text in zip(("first", "second"), texts, strict=False):
        if not text or not text.strip():
            which = f"{number} sentence" if len(texts) == 2 else "text"
            raise Unusable(f"The {which} is empty: type something first.")
        if len(text) > MOST_CHARACTERS:
            raise Unusable(
                f"This text has {len(text):,} characters, and at most {MOST_CHARACTERS:,} are read: cut it."
            )
    return [text.strip() for text in texts]


def timed_scores(models: list[Classifier], content) -> tuple[list[torch.Tensor], list[float]]:
    """What each model says, and the median milliseconds of a forward pass; they take turns, after one to warm up."""
    inputs = [model.inputs(content) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for _ in range(1 + ROUNDS):
        scores = []
        for model, tensors, taken in zip(models, inputs, times, strict=True):
            start = time.perf_counter()
            scores.append(model.scores(tensors))
            taken.append(1000 * (time.perf_counter() - start))
    return scores, [statistics.median(taken[1:]) for taken in times]


def table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table of cells that are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = (
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def times_as(large: float, small: float, more: str, less: str) -> str:
    """How many times the student's number goes into the teacher's, in words."""
    ratio = large / small
    if 0.95 < ratio < 1.05:
        return "about the same"
    return f"{ratio:.1f} times {less}" if ratio >= 1 else f"{1 / ratio:.1f} times {more}"


def report(teacher: Classifier, student: Classifier, order: list[int], content) -> str:
    """The comparison as HTML."""
    (teacher_scores, student_scores), (teacher_ms, student_ms) = timed_scores([teacher, student], content)
    student_scores = student_scores[order]
    if len(order) == 1:
        gap = abs(teacher_scores - student_scores).item()
        answers = [f"{teacher_scores.item():.3f}", f"{student_scores.item():.3f}"]
        verdict, note, classes = f"The scores are {gap:.3f} apart", "", ""
    else:
        names = [escape(name) for name in teacher.names]
        best = [int(scores.argmax()) for scores in (teacher_scores, student_scores)]
        answers = [names[i] for i in best]
        verdict = "✓ Same answer" if best[0] == best[1] else "✗ Different answers"
        moved = 0.5 * abs(teacher_scores - student_scores).sum().item()
        note = (
            f"{100 * moved:.1f} % of the student's probability would have to move to other classes to be the "
            f"teacher's (total variation distance {moved:.3f}; 0 is the same, 1 is nothing in common)."
        )
        highest = torch.maximum(teacher_scores, student_scores)
        shown = highest.topk(min(SHOWN_CLASSES, len(names))).indices.tolist()
        rows = []
        for i in sorted(shown, key=lambda i: -teacher_scores[i]):
            cells = []
            for role, scores in (("teacher", teacher_scores), ("student", student_scores)):
                percent = 100 * scores[i].item()
                cells.append(f'{percent:.1f} %<span class="bar {role}" style="width: {percent:.1f}%"></span>')
            rows.append([names[i], *cells])
        classes = table(["Class", "Teacher", "Student"], rows)
        if len(shown) < len(names):
            rest = 100 * highest.sort(descending=True).values[len(shown)].item()
            classes += f'<p class="note">No other class has more than {rest:.1f} % with either model.</p>'
    where = "on a GPU" if DEVICE.type == "cuda" else f"on the CPU (threads: {torch.get_num_threads()})"
    facts = [
        ["Answer", *(f'<span class="answer">{answer}</span>' for answer in answers)],
        [
            "Latency",
            f"{teacher_ms:.1f} ms",
            f"{student_ms:.1f} ms<br>{times_as(teacher_ms, student_ms, 'slower', 'faster')}",
        ],
        [
            "Parameters",
            f"{teacher.parameters:,}",
            f"{student.parameters:,}<br>{times_as(teacher.parameters, student.parameters, 'more', 'fewer')}",
        ],
    ]
    return (
        f'<p class="verdict">{verdict}</p><p class="note">{note}</p>'
        + table(["", "Teacher", "Student"], facts)
        + classes
        + f'<p class="note">Latency: a forward pass, the median of {ROUNDS} in turn, {where}.</p>'
    )


def build(teacher: Classifier, student: Classifier, pair: bool) -> gr.Blocks:
    order = classes_in_order(teacher, student)
    is_image = teacher.kind == "image"

    def answer(*values: str) -> str:
        try:
            return report(teacher, student, order, (read_image if is_image else read_texts)(*values))
        except Unusable as error:
            return f'<p class="refused" role="alert">{escape(str(error))}</p>'

    with gr.Blocks(title="Teacher and student", fill_width=False) as demo:
        gr.Markdown(
            f"# Teacher and student\nThe student learnt from the teacher (knowledge distillation). Give both the same "
            f"{'image' if is_image else 'text'}, and see what the smaller one kept.\n\n"
            f"- Teacher: {shown_name(teacher)}\n- Student: {shown_name(student)}"
        )
        with gr.Row():
            with gr.Column():
                if is_image:
                    picture = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=300)
                    # The path alone: what is no image is for read_image to say.
                    picture.preprocess = lambda payload: payload and payload.path
                    inputs = [picture]
                else:
                    labels = ("First sentence", "Second sentence") if pair else ("Text",)
                    inputs = [gr.Textbox(label=label, lines=3) for label in labels]
                button = gr.Button("Compare", variant="primary")
            with gr.Column():
                result = gr.HTML("<p>The answers come here.</p>", elem_id="comparison")
        button.click(answer, inputs, result, api_name="compare")
    return demo


def shown_name(model: Classifier) -> str:
    """A Hub id, or the folder alone: where it lies is nobody's business."""
    return f"`{Path(model.name).resolve().name if Path(model.name).is_dir() else model.name}`"


def variable(name: str) -> str | None:
    return os.environ.get(name) or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=variable("TEACHER"), help="Hub id or local folder.")
    parser.add_argument("--student", default=variable("STUDENT"), help="Hub id or local folder.")
    parser.add_argument("--pair", action="store_true", default=variable("PAIR") == "1", help="Texts come in pairs.")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        default=variable("TRUST_REMOTE_CODE") == "1",
        help="Run model code that comes with the models.",
    )
    arguments = parser.parse_args()
    if not arguments.teacher or not arguments.student:
        parser.error(
            "name two models: TEACHER and STUDENT as variables, or --teacher and --student. After `make demo`: "
            "--teacher outputs/demo/teacher --student outputs/demo/taught-100-0 --trust_remote_code"
        )
    models = [
        Classifier(role, name, arguments.trust_remote_code)
        for role, name in (("teacher", arguments.teacher), ("student", arguments.student))
    ]
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    build(*models, arguments.pair).launch(
        theme=gr.themes.Default(**fonts),  # the system's: nothing is fetched from elsewhere
        css=CSS,
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        footer_links=[],
    )


if __name__ == "__main__":
    main()
