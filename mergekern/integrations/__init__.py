"""Drop-ins for other tools: one module each, with install() and uninstall()."""
