"""The first structures of a run's data, so that a test takes seconds."""

import dataclasses


class Few:
    """Takes the first structures of a dataset."""

    def __init__(self, dataset, count):
        self.dataset, self.info = dataset, dataset.info
        self.num_atoms, self.num_edges = dataset.num_atoms[:count], dataset.num_edges[:count]

    def __len__(self):
        return len(self.num_atoms)

    def __getitem__(self, index):
        return self.dataset[index]


def few(sources, count=8):
    return [
        dataclasses.replace(source, splits={name: Few(split, count) for name, split in source.splits.items()})
        for source in sources
    ]
