"""Drop-ins for other merge tools, one file each: the tool keeps its interface, mergekern computes.

Nothing here is imported by `import mergekern`, and no tool is imported before it is asked for.
"""
