"""Write copies of an image set whose test images, and in one of them the held-out ones, carry noise.

    python scripts/shifted_copy.py DATA/cifar10 outputs/shifted-cifar10

OUTPUT/clean and OUTPUT/shifted have the same training images, less a tenth that is held out, and the same noisy test
images. The held-out images of the one are clean, those of the other noisy. examples/run_image_kd.py reads both by
--data_dir, so that weights by influence on either can be compared on data that differ from training as the test does.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Dataset, Image
from PIL import Image as PillowImage

from hfkd.data import load_image_data


def noisy(split: Dataset, sigma: float, seed: int) -> Dataset:
    """Gaussian noise of ``sigma`` grey levels on every pixel, cut to [0, 255]."""
    rng = np.random.default_rng(seed)

    def add(row):
        pixels = np.asarray(row["image"], dtype=np.float64)
        changed = np.rint(pixels + rng.normal(0, sigma, pixels.shape)).clip(0, 255).astype(np.uint8)
        return {"image": PillowImage.fromarray(changed)}

    return split.map(add, load_from_cache_file=False, new_fingerprint=f"{split._fingerprint}-{sigma}-{seed}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", help="folder with train*.parquet and test*.parquet of images")
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--sigma", type=float, default=20.0, help="of the noise, in grey levels (CIFAR-10-C: 10 to 26)"
    )
    parser.add_argument("--held_out_fraction", type=float, default=0.1)
    args = parser.parse_args(arguments)
    data = load_image_data(
        data_dir=args.data_dir, dataset="the set", validation_fraction=0, held_out_fraction=args.held_out_fraction
    )
    if data.test is None or data.held_out is None:
        raise SystemExit(f"{args.data_dir} has no test split, or held_out_fraction is 0: both are needed")
    test = noisy(data.test, args.sigma, seed=0)
    for name, held_out in (("clean", data.held_out), ("shifted", noisy(data.held_out, args.sigma, seed=1))):
        folder = args.output / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, dataset in (("train", data.train), ("held_out", held_out), ("test", test)):
            dataset.remove_columns("index").cast_column("image", Image()).to_parquet(folder / f"{split}.parquet")
        print(f"{folder}: {len(data.train)} to train on, {len(held_out)} held out, {len(test)} to test on")


if __name__ == "__main__":
    main()
