"""Checks of many layouts, and what is planted in them: the campaign of `megallama check`."""
