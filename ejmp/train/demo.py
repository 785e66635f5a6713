"""A small teacher for users who have none yet: pre-trained once on the demo mix, then kept.

It has JMP's six blocks and heads at a fraction of the widths, so that pre-training, pruning and distilling it take
minutes on two cores. Nothing measured with it says anything about JMP-L.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

from torch import distributed as dist

from ejmp.data.store.durable import hash_file, hash_text
from ejmp.model.config import JMPConfig
from ejmp.train import presets
from ejmp.train.distributed import Ranks
from ejmp.train.loop import FINAL, Run, train
from ejmp.train.objective import Supervised
from ejmp.train.sources import demo_mix, tasks_of
from ejmp.train.start import new_model
from ejmp_kernels.cache import cache_root

CONFIG = presets.demo("pretrain")
"""Settings the teacher is pre-trained with."""


def demo_config(*, blocks: int = 6) -> JMPConfig:
    """Return the sizes of the demo model: 0.7 M parameters at six blocks, which have no residual layers.

    Args:
        blocks: number of interaction blocks.
    """
    return JMPConfig(
        blocks=blocks,
        emb_size_atom=64,
        emb_size_edge=64,
        emb_size_trip_in=16,
        emb_size_trip_out=16,
        emb_size_quad_in=8,
        emb_size_quad_out=8,
        emb_size_pair_in=16,
        emb_size_pair_out=16,
        emb_size_rbf=16,
        emb_size_cbf=8,
        emb_size_sbf=16,
        num_radial=64,
        num_before_skip=0,
        num_after_skip=0,
        num_concat=0,
        num_atom=0,
        num_output_after_atom=0,
        num_atom_emb_layers=0,
    )


def cache_folder() -> Path:
    """Return the folder where the teacher is kept, whose name has a hash of its sizes, settings and data."""
    counts = [len(source.split("train")) for source in demo_mix()]
    recipe = f"{demo_config()} {CONFIG} {counts}"
    return cache_root() / f"demo-teacher-{hash_text(recipe)}"


def demo_teacher(ranks: Ranks) -> Path:
    """Return the folder of the demo teacher, which the first call pre-trains: some minutes on two cores.

    Raises:
        ValueError: if the kept teacher is damaged, naming its folder.
        SystemExit: if this process is told to stop (SIGTERM) meanwhile.
    """
    folder = cache_folder()
    whole = folder.exists()
    dist.barrier()
    if whole:
        check_teacher(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".demo-teacher-")) if ranks.rank == 0 else folder
    sources = demo_mix()
    model = new_model(demo_config(), sources, seed=CONFIG.seed)
    config = dataclasses.replace(CONFIG, batch_size=max(1, CONFIG.batch_size // ranks.world_size))
    objective = Supervised(model, tasks_of(sources))
    try:
        result = train(Run(objective=objective, sources=sources, config=config, directory=scratch, ranks=ranks))
        if not result.finished:
            raise SystemExit(0)
        if ranks.rank == 0:
            (scratch / FINAL / "checksum").write_text(checksum(scratch / FINAL))
            (scratch / FINAL).rename(folder)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(scratch)
    dist.barrier()
    return folder


def checksum(folder: Path) -> str:
    """Return the hash of a saved model's weights."""
    return hash_file(folder / "model.safetensors")


def check_teacher(folder: Path) -> None:
    """Raise ValueError if the kept teacher is not as it was written."""
    try:
        good = (folder / "checksum").read_text() == checksum(folder)
    except OSError as error:
        raise ValueError(f"demo teacher: {folder} is not whole ({error}); remove it to make it again") from error
    if not good:
        raise ValueError(f"demo teacher: {folder} is damaged; remove it to make it again")
