"""Speed and quality, measured; nothing here ships in the wheel."""
