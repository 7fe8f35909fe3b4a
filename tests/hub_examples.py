"""Run command lines of the examples one after the other, in one process: ``test_hub.py`` has them talk to a Hub.

The file that is named holds a list of them as JSON, ``[script, *flags]``; ``["pull", id, revision, folder]``
downloads a repository. How each one ended goes to standard output, as a last line of JSON.
"""

import json
import runpy
import sys
import warnings
from pathlib import Path

from huggingface_hub import snapshot_download


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(words: list[str]) -> int:
    if words[0] == "pull":
        _, repo_id, revision, folder = words
        snapshot_download(repo_id, revision=revision, local_dir=folder)
        return 0
    sys.argv = words
    try:
        runpy.run_path(str(EXAMPLES / words[0]), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


if __name__ == "__main__":
    warnings.simplefilter("always", UserWarning)
    statuses = []
    for words in json.loads(Path(sys.argv[1]).read_text()):
        print("$", *(word for word in words if not word.startswith("hf_")), flush=True)
        statuses.append(run(words))
    print(json.dumps(statuses))
