"""A stand-in for a checkout of the public JMP code, with its names and none of its text: ejmp's reference inside."""

import textwrap

FILES = {
    "models/gemnet/config.py": """
        class BackboneConfig(dict):
            pass
    """,
    "models/gemnet/backbone.py": """
        import torch
        from torch import nn

        import ejmp


        class GemNetOCBackbone(nn.Module):
            def __init__(self, config, **_):
                super().__init__()
                print("a line of its own")
                self.whole = [ejmp.JMP(ejmp.JMPConfig.from_upstream(config), "reference")]
                for name, child in self.whole[0].backbone.named_children():
                    self.add_module(name, child)

            def forward(self, batch, *, h):
                whole = self.whole[0]
                whole.embedding.forward = lambda _numbers: h
                ends = zip(batch.ptr[:-1], batch.ptr[1:])
                structures = [
                    ejmp.Structure(numbers=batch.atomic_numbers[i:j].numpy(), positions=batch.pos[i:j].numpy())
                    for i, j in ends
                ]
                graph = ejmp.build_graph(structures, float(batch.cutoff[0]), batch.most.tolist())
                found = whole.features(graph)
                return {"energy": found.mlp_E[-1], "forces": found.mlp_F[-1], "idx_t": graph.main.target}
    """,
    "utils/goc_graph.py": """
        class Cutoffs:
            from_constant = float


        class MaxNeighbors:
            from_goc_base_proportions = int


        def generate_graphs(data, *, cutoffs, max_neighbors, pbc):
            return {"cutoff": [cutoffs], "most": [max_neighbors]}


        def graphs_to_batch(data, graphs):
            data.cutoff, data.most = graphs["cutoff"][0], graphs["most"][0]
            return data
    """,
}


def write_checkout(folder):
    """Write the stand-in and return its folder."""
    for name, text in FILES.items():
        path = folder / "src" / "jmp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder
