"""Plugins that other programs load by an entry point, and what fits loreg into them. ``import loreg`` loads none."""
