"""Kinds of devices with which to begin."""

from collections.abc import Mapping

from fedpeft.rounds.devices import Device

# Assumptions, not measurements: what such a device sustains while it trains in fp32 (a tenth or less of its peak), what
# a home or mobile line gives, and a habit. State your own where they matter.
PACKAGED: Mapping[str, Device] = {
    "phone": Device(
        gflops=15,
        memory="3GB",
        up="5Mbit/s",
        down="20Mbit/s",
        latency=0.08,
        jitter=0.3,
        online_hours=((0.0, 8.0),),
        period_hours=24,
        spread_hours=24,
    ),
    "laptop": Device(
        gflops=60,
        memory="8GB",
        up="10Mbit/s",
        down="50Mbit/s",
        latency=0.04,
        jitter=0.2,
        online_hours=((0.0, 12.0),),
        period_hours=24,
        spread_hours=24,
    ),
    "board": Device(gflops=4, memory="3GB", up="10Mbit/s", down="30Mbit/s", latency=0.04, jitter=0.1),
    "edge": Device(gflops=400, memory="32GB", up="500Mbit/s", down="500Mbit/s", latency=0.01, jitter=0.05),
}
