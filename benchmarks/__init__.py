"""Speed, cost and quality, side by side with what people use today; nothing here ships in the wheel."""
