"""Bridges to third parties. Each module imports its library only when it is used."""
