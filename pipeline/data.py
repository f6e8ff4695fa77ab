"""Stage data: fetches the data set, checks it, and writes its splits to data/<dataset>/."""

from _stage import run
from hobs_rspar import config, data, sources
from hobs_rspar.paths import Paths


def main() -> None:
    params = config.load()
    folder = Paths.of(params.study).data
    raw = sources.read(params.study.dataset, params.data)
    images = data.split_and_save(raw, params.study.dataset, params.data, folder)["images"]
    print(f"data {params.study.dataset}: {', '.join(f'{count} {name}' for name, count in images.items())} images "
          f"from {raw.source}")
    for note in raw.notes:
        print(f"  {note}")


if __name__ == "__main__":
    run(main)
