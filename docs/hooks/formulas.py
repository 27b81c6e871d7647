"""Turns ```math blocks, which GitHub renders by itself, into MathML, which browsers render without scripts."""

from latex2mathml.converter import convert


def _formula(source, language, css_class, options, md, **kwargs):
    return f"<p>{convert(source.strip(), display='block')}</p>"


def on_config(config):
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "formula", "format": _formula})
    return config
