"""Every schedule against what is published of it; `python -m tests.schedules` runs them all."""
