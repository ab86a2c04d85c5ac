"""Processes: how ranks are started, run, watched and ended."""
