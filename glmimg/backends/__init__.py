"""Devices and what they can do."""
