#include "CLiger.h"
