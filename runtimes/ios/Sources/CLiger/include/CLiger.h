#include "../../../../include/liger.h"
