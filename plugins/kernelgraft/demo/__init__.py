"""``kernelgraft demo``: what the plugins do, shown on real input and written down in one report.

Every plugin has a section, a module here that is named for it; :mod:`.sections` lists them.
"""
