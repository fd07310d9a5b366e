"""A Triton backend named "cpu" that compiles nothing.

vLLM's CPU build turns Triton off, and with it Model Runner V2, unless a backend of that name is registered. Under
TRITON_INTERPRET=1 every kernel runs in Triton's interpreter and no backend is ever asked to compile. Put the folder
above on PYTHONPATH: Triton and vLLM find their entry points in the dist-info beside this package.
"""
