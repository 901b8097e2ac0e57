"""Many requests on one model: queue, order, packing and admission. Knows no HTTP."""
