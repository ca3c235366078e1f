"""Trained models for diffusers' own pipelines."""

from lpl_lightning.export.writing import ExportPrecision, export_checkpoint, export_diffusers

__all__ = ["ExportPrecision", "export_checkpoint", "export_diffusers"]
