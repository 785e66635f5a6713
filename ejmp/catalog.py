"""The catalogue: one row for each dataset that ejmp knows, with everything known of it before its files are there.

A row says where the files are published and under which licence, how the structures are divided into splits, which
graphs JMP makes of them, and the normalisation JMP was trained with (Shoghi et al., ICLR 2024, arXiv 2310.16802, and
the code published with it). Everything else that needs one of these facts reads it here. The file is plain data: it
imports nothing that needs torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ejmp.graph.settings import GraphSettings

_OC = "https://dl.fbaipublicfiles.com/opencatalystproject/data"
_FIGSHARE = "https://figshare.com/ndownloader"
_MD22 = "http://www.quantum-machine.org/gdml/repo/datasets"
_FAIR_CHEM = "https://fair-chem.github.io"
_SEE_PAGE = "not known to ejmp: see the page"
_MD22_SIZES = {
    "Ac-Ala3-NHMe": 6000,
    "DHA": 8000,
    "stachyose": 8000,
    "AT-AT": 3000,
    "AT-AT-CG-CG": 2000,
    "buckyball-catcher": 600,
    "double-walled_nanotube": 800,
}


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file that can be downloaded. Its size and hash are those its publisher states."""

    url: str
    """Address of the file."""
    name: str
    """Name the file gets on this machine."""
    size: str = "not stated"
    """Size in words, such as "344 MB"."""
    hash: str | None = None
    """Hash of the contents as pooch takes it, such as "md5:..."; None if the publisher states none."""


@dataclass(frozen=True, kw_only=True)
class Download:
    """What one `ejmp data fetch NAME` downloads: a dataset, or a published part of one."""

    name: str
    """Name on the command line."""
    format: str
    """Format of the files, a name of `ejmp.data.read.FORMATS`."""
    files: tuple[RemoteFile, ...]
    """Files of the download."""


@dataclass(frozen=True, kw_only=True)
class PublishedSplit:
    """Every part of the source says which split it belongs to."""


@dataclass(frozen=True, kw_only=True)
class FormulaSplit:
    """Shuffle the molecular formulas and hold out whole formulas: first for validation, then for testing."""

    held_out: int
    """Frames after which validation, and then testing, has enough; at most a tenth of a source that is smaller."""


@dataclass(frozen=True, kw_only=True)
class FractionSplit:
    """Shuffle all structures of the source and take fractions, rounded down; validation has the rest."""

    train: float
    """Fraction for training."""
    test: float
    """Fraction for testing."""


@dataclass(frozen=True, kw_only=True)
class HeldOutSplit:
    """Shuffle all structures of the source and hold out fixed numbers; training has the rest."""

    val: int
    """Structures for validation."""
    test: int
    """Structures for testing."""


@dataclass(frozen=True, kw_only=True)
class FileSplit:
    """Shuffle the frames of each file by itself and take fixed numbers; testing has the rest."""

    train: int
    """Frames of each file for training."""
    val: int
    """Frames of each file for validation."""


@dataclass(frozen=True, kw_only=True)
class MoleculeSplit:
    """Shuffle the frames of each file by itself and take a number that depends on the file's molecule."""

    sizes: Mapping[str, int]
    """Frames for training and validation together, by molecule; testing has the rest."""
    val: float
    """Fraction of these frames for validation, rounded down."""


SplitRule = PublishedSplit | FormulaSplit | FractionSplit | HeldOutSplit | FileSplit | MoleculeSplit
"""How the structures of a dataset are divided into training, validation and test; `ejmp.data.store.splits` does it."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Normalisation and loss weight of one of JMP's four pre-training tasks; the mean energy is 0."""

    energy_std: float
    """Standard deviation of the energy after the linear reference, eV."""
    force_std: float
    """Standard deviation of the force components, eV/A."""
    force_weight: float
    """Weight of the loss of the forces; that of the energy is 1."""


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """JMP's recipe for a fine-tuning task, as far as it is not that of all tasks (`ejmp.train.presets.finetune`).

    The numbers are those of the configuration with which JMP's authors run all targets (learning rate 8e-5).
    """

    task: str
    """Name of the task."""
    target: str = "energy"
    """What is learned: "energy", or the name that the dataset's reader gives to a target."""
    unit: str = "eV"
    """Unit of the target."""
    mean: float
    """Mean of the target after its linear reference, in its unit."""
    std: float
    """Standard deviation of the target after its linear reference, in its unit. Not used if forces alone are trained:
    they are compared in units of `force_std`, and the energy is their potential."""
    has_reference: bool = False
    """Whether a linear reference, which comes with the data, is subtracted from the target."""
    force_std: float | None = None
    """Standard deviation of the force components, eV/A; None if the task has no forces."""
    energy_weight: float = 1.0
    """Weight of the target's error in the loss."""
    force_weight: float = 0.0
    """Weight of the forces' error in the loss."""
    reduction: Literal["sum", "mean"] = "sum"
    """How atoms' outputs make a structure's."""
    batch_size: int
    """Structures per step."""
    plateau_patience: int = 3
    """Epochs without a better validation after which the learning rate falls, once the cosine has ended."""
    early_stop: int = 50
    """Epochs without a better validation after which training ends."""
    epochs: int = 500
    """Most epochs."""


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One row of the catalogue."""

    name: str
    """Name of the dataset, which is also that of its format."""
    licence: str
    """Licence of the published files."""
    page: str
    """Web page of the dataset."""
    downloads: tuple[Download, ...]
    """What can be downloaded of it."""
    graph: GraphSettings
    """Graphs that JMP makes of it."""
    split: SplitRule = field(default_factory=PublishedSplit)
    """How it is divided into splits."""
    pretraining: Pretraining | None = None
    """JMP's pre-training task on it; None if JMP is not pre-trained on it."""
    finetuning: tuple[Finetuning, ...] = ()
    """JMP's fine-tuning tasks on it that are known here; the first is the one of Ghunaim et al. 2025."""
    referenced: tuple[str, ...] = ()
    """Targets, beside the energy, from which JMP subtracts a linear reference before it learns them."""
    demo: bool = False
    """Whether the embedded demo mix has a small dataset like it."""


def _file(url: str, name: str | None = None, size: str = "not stated", md5: str | None = None) -> RemoteFile:
    """Return a remote file, called as the last part of its address says unless a name is given."""
    return RemoteFile(url=url, name=name or url.rpartition("/")[2], size=size, hash=f"md5:{md5}" if md5 else None)


def _whole(name: str, *files: RemoteFile) -> tuple[Download]:
    """Return the one download of a dataset that is published as a whole, in its own format."""
    return (Download(name=name, format=name, files=files),)


def _oc20(name: str, file: str, size: str, md5: str) -> Download:
    return Download(name=name, format="oc20_text", files=(_file(f"{_OC}/{file}.tar", size=size, md5=md5),))


_ROWS = (
    DatasetEntry(
        name="oc20",
        demo=True,
        licence="CC-BY-4.0",
        page=_FAIR_CHEM,
        downloads=(
            _oc20("oc20-200k", "s2ef_train_200K", "344 MB", "f8d0909c2623a393148435dede7d3a46"),
            _oc20("oc20-2m", "s2ef_train_2M", "3.4 GB", "953474cb93f0b08cdc523399f03f7c36"),
            _oc20("oc20-20m", "s2ef_train_20M", "34 GB", "863bc983245ffc0285305a1850e19cf7"),
            _oc20("oc20-all", "s2ef_train_all", "225 GB", "12a7087bfd189a06ccbec9bc7add2bcd"),
            _oc20("oc20-val-id", "s2ef_val_id", "1.7 GB", "f57f7f5c1302637940f2cc858e789410"),
        ),
        graph=GraphSettings(cutoff=12.0),
        pretraining=Pretraining(energy_std=24.901469505465872, force_std=0.5111534595489502, force_weight=73.0),
    ),
    DatasetEntry(
        name="oc22",
        demo=True,
        licence="CC-BY-4.0",
        page=_FAIR_CHEM,
        downloads=_whole(
            "oc22",
            _file(
                f"{_OC}/oc22/s2ef_total_train_val_test_lmdbs.tar.gz",
                size="20 GB",
                md5="ebea523c6f8d61248a37b4dd660b11e6",
            ),
        ),
        graph=GraphSettings(cutoff=12.0),
        pretraining=Pretraining(energy_std=25.229595396538468, force_std=0.25678861141204834, force_weight=80.0),
    ),
    DatasetEntry(
        name="ani1x",
        demo=True,
        licence="CC0",
        page="https://doi.org/10.6084/m9.figshare.10047041.v1",
        downloads=_whole(
            "ani1x",
            _file(f"{_FIGSHARE}/files/18112775", "ani1x-release.h5", "5.6 GB", "98090dd6679106da861f52bed825ffb7"),
        ),
        split=FormulaSplit(held_out=495_600),
        graph=GraphSettings(cutoff=8.0, tags="none"),
        pretraining=Pretraining(energy_std=2.8700712783472118, force_std=2.131422996520996, force_weight=15.0),
    ),
    DatasetEntry(
        name="transition1x",
        demo=True,
        licence=_SEE_PAGE,
        page="https://gitlab.com/matschreiner/Transition1x",
        downloads=_whole("transition1x", _file(f"{_FIGSHARE}/files/36035789", "Transition1x.h5", "6.6 GB")),
        graph=GraphSettings(cutoff=8.0, tags="none"),
        pretraining=Pretraining(energy_std=1.787466168382901, force_std=0.3591422140598297, force_weight=14.0),
    ),
    DatasetEntry(
        name="rmd17",
        demo=True,
        licence="CC0",
        page="https://figshare.com/articles/dataset/Revised_MD17_dataset_rMD17_/12672038",
        downloads=_whole("rmd17", _file(f"{_FIGSHARE}/files/23950376", "rmd17.tar.bz2")),
        split=FileSplit(train=950, val=50),
        graph=GraphSettings(cutoff=7.0, max_neighbors=100, tags="none"),
        finetuning=(
            Finetuning(
                task="aspirin",
                mean=-17617.379355234374,
                std=0.2673998440577667,
                force_std=1.2733363,
                energy_weight=0.0,
                force_weight=10.0,
                batch_size=1,
                plateau_patience=10,
                early_stop=1000,
                epochs=100_000,
            ),
        ),
    ),
    DatasetEntry(
        name="qm9",
        demo=True,
        licence="CC0",
        page="https://figshare.com/collections/_/978904",
        downloads=_whole(
            "qm9",
            _file(f"{_FIGSHARE}/files/3195389", "dsgdb9nsd.xyz.tar.bz2", "86 MB", "ad1ebd51ee7f5b3a6e32e974e5d54012"),
            _file(f"{_FIGSHARE}/files/3195404", "uncharacterized.txt", "0.5 MB", "a361887bacb427b8a0ce7903d92a53b4"),
        ),
        split=HeldOutSplit(val=10_000, test=10_000),
        graph=GraphSettings(cutoff=8.0, tags="none"),
        finetuning=(Finetuning(task="qm9_u0", mean=0.0028667436, std=1.0965848, has_reference=True, batch_size=48),),
        referenced=("U0", "U", "H", "G", "Cv", "zpve"),
    ),
    DatasetEntry(
        name="spice",
        demo=True,
        licence=_SEE_PAGE,
        page="https://zenodo.org/records/8222043",
        downloads=_whole("spice", _file("https://zenodo.org/records/8222043/files/SPICE-1.1.4.hdf5")),
        split=FractionSplit(train=0.8, test=0.1),
        graph=GraphSettings(cutoff=12.0, tags="none"),
        finetuning=(
            Finetuning(
                task="solvated_amino_acids",
                mean=-60673.68,
                std=3310.6692,
                force_std=0.81945145,
                energy_weight=0.0,
                force_weight=100.0,
                batch_size=2,
            ),
        ),
    ),
    DatasetEntry(
        name="md22",
        demo=True,
        licence=_SEE_PAGE,
        page="http://www.quantum-machine.org/gdml",
        downloads=_whole("md22", *(_file(f"{_MD22}/md22_{molecule}.npz") for molecule in _MD22_SIZES)),
        split=MoleculeSplit(sizes=_MD22_SIZES, val=0.05),
        graph=GraphSettings(cutoff=12.0, tags="none"),
        finetuning=(
            Finetuning(
                task="ac_ala3_nhme",
                mean=-26913.953,
                std=0.35547638,
                force_std=1.1291506,
                energy_weight=0.0,
                force_weight=100.0,
                batch_size=2,
            ),
        ),
    ),
    DatasetEntry(
        name="qmof",
        demo=True,
        licence="CC-BY-4.0",
        page="https://figshare.com/articles/dataset/_/13147324",
        downloads=_whole("qmof", _file(f"{_FIGSHARE}/articles/13147324/versions/14", "qmof.zip")),
        split=FractionSplit(train=0.8, test=0.1),
        graph=GraphSettings(cutoff=19.0, fewer_above=((200, 10), (300, 5)), tags="none"),
        finetuning=(
            Finetuning(
                task="qmof_gap",
                target="bandgap",
                mean=2.1866251527,
                std=1.175752521125648,
                reduction="mean",
                batch_size=4,
            ),
        ),
    ),
)

CATALOG: Mapping[str, DatasetEntry] = {row.name: row for row in _ROWS}
"""All rows by name: first the four JMP is pre-trained on, in the order of its heads, then those it is fine-tuned on."""
DOWNLOADS: Mapping[str, tuple[DatasetEntry, Download]] = {
    download.name: (row, download) for row in _ROWS for download in row.downloads
}
"""Every download by its name, with the row it belongs to."""
FINETUNING: Mapping[str, Finetuning] = {task.task: task for row in _ROWS for task in row.finetuning}
"""Every fine-tuning task by its name."""
