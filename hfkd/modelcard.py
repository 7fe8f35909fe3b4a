"""The model card of a distilled student."""
from pathlib import Path

def write_model_card(trainer, *args, **kwargs):
    Path(trainer.args.output_dir, "README.md").write_text("# student\n")
