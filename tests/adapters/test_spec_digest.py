"""The fingerprint of an adapter's shape."""

from dataclasses import replace

import numpy as np

from fedpeft.adapters import Adapter, Layer, LowRank, Spec


def test_a_shape_has_one_fingerprint_and_every_part_of_it_counts() -> None:
    spec = Spec((Layer("q", 7, 5, 3, 2.0), Layer("v", 4, 5, 3, 2.0)), (("head", (3, 7)),))
    layer = spec.layers[0]
    others = [
        replace(spec, layers=(changed, spec.layers[1]))
        for changed in (
            replace(layer, name="k"),
            replace(layer, d=8),
            replace(layer, k=6),
            replace(layer, rank=4),
            replace(layer, scale=2.5),
        )
    ] + [
        replace(spec, layers=spec.layers[::-1]),
        replace(spec, dense=()),
        replace(spec, dense=(("head", (7, 3)),)),
        replace(spec, dense=(("tail", (3, 7)),)),
    ]
    prints = [x.digest for x in (spec, *others)]
    assert len(set(prints)) == len(prints)
    assert Adapter({"q": LowRank(np.ones((3, 5)), np.ones((7, 3)), 2.0)}).spec.digest == Spec((layer,)).digest
    assert spec.digest == "c8e785aae8ccb7cba3eb91b21981423f42623f831ddde52bf463e752d79d1350"  # of all versions
