"""A page in the browser that shows what trained models do: ``tokenflow demo``.

A file for each tab, ``page`` for what they share, and modules without Gradio for what is shown.
"""
