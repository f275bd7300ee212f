"""What is wrong or odd about an adapter, and what to do: `lorakit.doctor`."""
