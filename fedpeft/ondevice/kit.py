"""Kits as the device sees them: ``fedpeft.training.kit``, where what writes them can reach it too."""

from fedpeft.training.kit import Facts, Kit, write_manifest

__all__ = ["Facts", "Kit", "write_manifest"]
