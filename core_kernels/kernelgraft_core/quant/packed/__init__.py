"""What the linear layers of packed weights share, whatever the width: one room each for weight, ops, backends."""
