"""Registered experiments; each module imports config and registry only."""
